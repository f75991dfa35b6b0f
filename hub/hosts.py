"""Which checkpoints can be converted: an entry for every `model_type`, and all that is known of it.

To add a host model: an entry in `HOSTS` under the `model_type` of its vanilla configuration.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from .. import FastLongSpeechConfig, FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from ..host_fastlongspeech import KEY_MAPPING


@dataclass(frozen=True)
class Host:
    """A kind of checkpoint, and what it becomes.

    Attributes:
        names: regular expressions of the names that its parameters may have, and what our names begin with instead.
        config, model, processor: our classes.
        stock: the name of the class of transformers that reads the same checkpoint without our code.
        audio_tower, projector: the paths of these parts in the stock model; the tower's `layer_norm` is its last step.
    """

    names: Mapping[str, str]
    config: Any = FastLongSpeechConfig
    model: Any = FastLongSpeechForConditionalGeneration
    processor: Any = FastLongSpeechProcessor
    stock: str = "Qwen2AudioForConditionalGeneration"
    audio_tower: str = "model.audio_tower"
    projector: str = "model.multi_modal_projector"

    def rename(self, name: str) -> str:
        """Returns our name of a parameter."""
        for pattern, replacement in self.names.items():
            if re.search(pattern, name):
                return re.sub(pattern, replacement, name)
        return name

    def load_stock(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        """Returns the checkpoint as transformers' own class reads it; a CTC decoder is left out."""
        kind = getattr(transformers, self.stock)
        fields, _ = kind.config_class.get_config_dict(folder)
        config: Any = kind.config_class.from_dict({**fields, "model_type": kind.config_class.model_type})
        return kind.from_pretrained(folder, config=config, dtype=dtype).eval()


_QWEN2_AUDIO = Host(names=KEY_MAPPING)
HOSTS = {
    "qwen2_audio": _QWEN2_AUDIO,  # Qwen2-Audio-7B and 7B-Instruct
    "long_speech_qwen2audio": _QWEN2_AUDIO,  # the weights that were released with the paper
    "fastlongspeech": _QWEN2_AUDIO,  # ours: another dtype, other shards, an adapter to merge
}


def find_host(model_type: str | None, where: str) -> Host:
    """Returns what is known of a `model_type`.

    Raises:
        ValueError: nothing is.
    """
    if model_type not in HOSTS:
        raise ValueError(f"{where} has the model_type {model_type!r}; one of {', '.join(HOSTS)} can be converted.")
    return HOSTS[model_type]


__all__ = ["HOSTS", "Host", "find_host"]
