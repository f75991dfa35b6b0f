"""Where the tokens of a prompt stand once its recordings have summary tokens, and what each of them sees.

Positions alone, and no model: `summary_fastlongspeech.py` reads by them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .windows_fastlongspeech import summary_intervals


class Layout(NamedTuple):
    """Where the tokens of a prompt stand once its recordings have summary tokens, all `(N,)` int64.

    Attributes:
        source: the place of each token in the prompt as it was; -1 for a summary token.
        interval: the number of its interval; -1 for text.
        position: its rotary position while its own interval is read.
        rank: its position in what stays: what a summary token moves to.
    """

    source: Tensor
    interval: Tensor
    position: Tensor
    rank: Tensor


def interleave(frames: int, ratio: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """Returns an interval's tokens: the place of each among its frames, -1 for a summary token, and which are these.

    One follows every `ratio` frames; fewer at the end have one too.
    """
    groups = torch.arange(frames, device=device).split(ratio)
    summary = torch.full((1,), -1, device=device)
    source = torch.cat([part for group in groups for part in (group, summary)])
    return source, source < 0


def lay_out(real: Tensor, placeholders: Tensor, interval: int, ratio: int | Sequence[int]) -> Layout:
    """Returns where the tokens of a prompt stand with its summary tokens among them.

    Args:
        real: `(S,)` bool, which places of the prompt hold a token.
        placeholders: `(S,)` bool, which hold a recording's embedding.
        interval, ratio: as in `summary_intervals`.
    """
    places = real.nonzero()[:, 0]
    kinds, sizes = (placeholders & real)[places].unique_consecutive(return_counts=True)
    parts: list[tuple[Tensor, ...]] = []
    number = kept = 0
    for is_audio, run in zip(kinds.tolist(), places.split(sizes.tolist()), strict=True):
        if not is_audio:
            ranks = kept + torch.arange(len(run))
            parts.append((run, torch.full_like(run, -1), ranks, ranks))
            kept += len(run)
            continue
        for start, stop, of_interval in summary_intervals(len(run), interval, ratio):
            source, mask = interleave(stop - start, of_interval)
            ranks = kept + mask.cumsum(0) - 1
            source = torch.where(mask, source, run[start:stop][source.clamp(min=0)])
            parts.append((source, torch.full_like(source, number), kept + torch.arange(len(source)), ranks))
            number, kept = number + 1, kept + int(mask.sum())
    return Layout(*(torch.cat(part) for part in zip(*parts, strict=True)))


def summary_columns(summaries: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where each row's summary tokens stand `(B, S)`, padded with 0, and which of these are no padding."""
    counts = summaries.sum(1)
    valid = torch.arange(int(counts.max())) < counts[:, None]
    return torch.zeros(valid.shape, dtype=torch.int64).masked_scatter(valid, summaries.nonzero()[:, 1]), valid


def see(interval: Tensor, columns: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which tokens each token sees as they were read `(B, N, N)`, and which summaries as memory `(B, N, S)`.

    What is before it: text and its own interval as they were read, the summaries of other intervals as memory.
    """
    place = torch.arange(interval.shape[1])
    same = interval[:, :, None] == interval[:, None, :]
    seen = (same | (interval == -1)[:, None, :]) & (place <= place[:, None])
    other = interval[:, :, None] != interval.gather(1, columns)[:, None, :]
    return seen, other & valid[:, None, :] & (columns[:, None, :] < place[:, None])


__all__ = ["Layout", "interleave", "lay_out", "see", "summary_columns"]
