"""What `cost.py` has no formula for, counted by torch on a model without weights.

On torch's meta device tensors have shapes and no contents, so that nothing is computed and nothing takes memory.
"""

import dataclasses
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, DynamicCache

from ..compression_fastlongspeech import COMPRESSIONS, check_compression
from ..fusion_fastlongspeech import FusionSettings
from .hosts import host_of
from .sizes import Sizes

aten = torch.ops.aten


def _per_result(*_: Any, out_shape: Any = None, **__: Any) -> int:
    return prod(out_shape)


def _per_element(shape: Any, *_: Any, **__: Any) -> int:
    return prod(shape)


# What a compression does and torch's counter would pass over.
ELEMENTWISE = {
    aten.mul: _per_result,
    aten.div: _per_result,
    aten.sum: _per_element,
    aten.index_add_: lambda result, dim, index, source, *_, **__: prod(source),
    aten.linalg_vector_norm: lambda shape, *_, **__: 2 * prod(shape),
}


@torch.no_grad()
def count(work: Callable[[], Any], custom: Mapping[Any, Any] | None = None) -> int:
    """Returns the operations of what is called: products of matrices, convolutions and whatever `custom` counts.

    The angles of rotary positions are left out: they are a product of matrices in older versions of transformers only.
    """
    with FlopCounterMode(display=False, custom_mapping=dict(custom or {})) as counter:
        work()
    angles = [sum(n.values()) for name, n in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(angles)


def compression_work(
    compression: str, width: int, frames: int, target_length: int, schedule: str, ladder: tuple[int, ...]
) -> tuple[int, int]:
    """Returns how many frames a compression asks the density of, all rounds together, and its other operations.

    Args:
        compression: a name of `COMPRESSIONS`.
        width: of a frame.
        frames: of the recording.
        target_length, schedule, ladder: as the configuration has them.

    Raises:
        ValueError: the compression is unknown, or `target_length` is below 1.
    """
    check_compression(compression)
    asked = 0

    def density(hidden: Tensor) -> Tensor:
        nonlocal asked
        asked += hidden.shape[:-1].numel()
        return torch.empty(hidden.shape[:-1], device="meta")

    recording = torch.empty(1, frames, width, device="meta")
    lengths = torch.tensor([frames])
    settings = FusionSettings(density, schedule, ladder)
    work = count(lambda: COMPRESSIONS[compression](recording, lengths, target_length, settings), ELEMENTWISE)
    return asked, work


class CountedLanguageModel:
    """A language model of any kind without weights; it counts as `LanguageModelSizes` does.

    Args:
        config: the `text_config` of a config.json.
        model: a host's own, without weights; None: the Auto classes make it.
    """

    def __init__(self, config: Mapping[str, Any], model: Any = None) -> None:
        if model is None:
            with torch.device("meta"):
                model = AutoModel.from_config(AutoConfig.for_model(**config)).eval()
        self.model, self.config = model, model.config
        self.model.set_attn_implementation("eager")  # its products are counted on every device
        if self.model._can_set_experts_implementation():
            self.model.set_experts_implementation("batched_mm")  # which asks no tensor for its contents
        self.width, self.vocabulary = self.config.hidden_size, self.config.vocab_size
        self._counts: dict[tuple[int, int], int] = {}

    def forward(self, tokens: int, cached: int) -> int:
        """Returns the operations of the layers for new tokens after cached ones."""
        if (tokens, cached) not in self._counts:
            cache = DynamicCache(config=self.config)
            if cached:
                self._run(cached, cache)
            self._counts[tokens, cached] = count(lambda: self._run(tokens, cache))
        return self._counts[tokens, cached]

    @torch.no_grad()
    def _run(self, tokens: int, cache: DynamicCache) -> None:
        self.model(inputs_embeds=torch.empty(1, tokens, self.width, device="meta"), past_key_values=cache)


class CountedHost:
    """The encoder and the projector of any host, without weights.

    Args:
        fields: what the config.json of a model holds, ours or the host's own.

    Attributes:
        config: its configuration.
        sizes: what the rest of the work depends on.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        config_class, model_class, _ = host_of(dict(fields)).load()
        self.config = config_class.from_dict({**fields, "model_type": config_class.model_type})
        with torch.device("meta"):
            self.model = model_class(self.config).model.eval()
        self.model.set_attn_implementation("eager")  # its products are counted on every device
        settings: dict[str, Any] = {
            field.name: getattr(self.config, field.name, None) for field in dataclasses.fields(Sizes)
        }
        audio = self.config.audio_config
        settings |= {"mel_bins": audio.num_mel_bins, "mlp": 0, "layers": 0}  # which `window` counts
        settings |= {"width": self.config.frame_width, "text_config": self.config.get_text_config().to_dict()}
        self.sizes = Sizes(**settings)
        self._counts: dict[int, int] = {}

    def language_model(self) -> CountedLanguageModel:
        """Returns the host's language model, which may be of a kind that the Auto classes don't know."""
        return CountedLanguageModel(self.sizes.text_config, self.model.language_model)

    def window(self, mel_frames: int) -> int:
        """Returns the operations of encoding one window with so many mel frames of audio."""
        if mel_frames not in self._counts:
            features = torch.empty(1, self.sizes.mel_bins, self.config.windows.mel_frames_per_window, device="meta")
            self._counts[mel_frames] = count(lambda: self.model.encode_windows(features, torch.tensor([mel_frames])))
        return self._counts[mel_frames]

    def projector(self, frames: int) -> int:
        """Returns the operations of bringing frames to the width of the language model."""
        hidden_states = torch.empty(frames, self.sizes.width, device="meta")
        return count(lambda: self.model.project(self.model.normalise(hidden_states)))


__all__ = ["CountedHost", "CountedLanguageModel", "compression_work", "count"]
