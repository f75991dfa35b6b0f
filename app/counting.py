"""What `cost.py` has no formula for, counted by torch on a model without weights.

On torch's meta device tensors have shapes and no contents, so that nothing is computed and nothing takes memory.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, DynamicCache

from ..compression_fastlongspeech import COMPRESSIONS, check_compression
from ..fusion_fastlongspeech import FusionSettings

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
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = AutoConfig.for_model(**config)
        with torch.device("meta"):
            self.model = AutoModel.from_config(self.config).eval()
        self.model.set_attn_implementation("eager")  # its products are counted on every device
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


__all__ = ["CountedLanguageModel", "compression_work", "count"]
