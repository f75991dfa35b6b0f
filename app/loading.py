"""A model and its processor, from a folder or the Hub onto a device."""

from typing import Any

import torch

from ..host_fastlongspeech import HostForConditionalGeneration
from ..processor_fastlongspeech import SpeechProcessor
from .hosts import find_host


def find_device(name: str | None = None) -> str:
    """Returns the device of that name; by default a GPU where there is one, else the CPU.

    Raises:
        ValueError: the device is not there.
    """
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")  # mps was never tried
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {error}") from error
    return device


def load_model(
    source: str, device: str | None = None, dtype: str = "auto", config: Any = None
) -> tuple[HostForConditionalGeneration, SpeechProcessor]:
    """Returns the model of a folder or Hub id, of whatever host, ready to answer, and its processor.

    Args:
        source: the folder or the Hub id.
        device: as in `find_device`.
        dtype: `"auto"` (as saved), `"float32"`, `"bfloat16"` or `"float16"`.
        config: a configuration that overrules the model's own, such as one `with_ntk_rope`.

    Raises:
        ValueError: the device is not there.
        OSError: there is no model.
    """
    device = find_device(device)
    _, model_class, processor_class = find_host(source).load()
    processor = processor_class.from_pretrained(source)
    options = {} if config is None else {"config": config}
    model = model_class.from_pretrained(source, dtype=dtype, **options)
    return model.to(device).eval(), processor


__all__ = ["find_device", "load_model"]
