"""Iterative fusion (Eq. 3-6 of the paper): a recording's frames, shortened to any length in a few rounds.

In each round the most similar neighbours are glued together (Eq. 4), as many as the next length asks for (Eq. 5, 6),
and every span of glued frames becomes its mean, weighted by content density (Eq. 3). All functions here take padded
batches, have no parameters and loop over rounds alone.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DensityFunction = Callable[[Tensor], Tensor]


class FusedFrames(NamedTuple):
    """What a compression returns.

    Attributes:
        frames: `(B, T', D)`, in the dtype of the frames given; zeros past a recording's length.
        lengths: `(B,)` int64, frames each recording has left.
        spans: `(B, T', 2)` int64, first frame and one past the last frame of the input that each frame stands for.
    """

    frames: Tensor
    lengths: Tensor
    spans: Tensor


def iterative_fusion(
    frames: Tensor,
    lengths: Tensor,
    target_length: int | Tensor,
    density_fn: DensityFunction,
    schedule: str = "halving",
    ladder: Sequence[int] = (),
) -> FusedFrames:
    """Fuses each recording to `target_length` frames; one that has no more is left alone.

    A recording's result does not depend on the others in the batch. Sums are accumulated in float32 in a fixed order.

    Args:
        frames: `(B, T, D)` floating point; what lies past a recording's length is ignored.
        lengths: `(B,)` integer, valid frames of each recording.
        target_length: L, 1 or more; one for all or `(B,)`.
        density_fn: content density (Eq. 3) `(B, T)` of frames `(B, T, D)`; asked again for the fused frames in every
            round, and treated as a constant by autograd.
        schedule: `"halving"` or `"ladder"`, see `next_lengths`.
        ladder: the rungs of the ladder schedule, in frames.

    Raises:
        ValueError: `target_length` is below 1, or the schedule is unknown.
    """
    device, dtype = frames.device, frames.dtype
    targets = torch.as_tensor(target_length, device="cpu").expand(len(frames))
    if len(targets) and int(targets.min()) < 1:
        raise ValueError(f"target_length must be a positive integer, got {int(targets.min())}.")

    plan = [lengths.to("cpu", torch.int64)]  # every round's lengths: the only time that the host waits for the device
    while bool((plan[-1] > targets).any()):
        plan.append(next_lengths(plan[-1], targets, schedule, ladder))
    widths = [int(shorter.max()) for shorter in plan[1:]]
    lengths, *rounds = torch.stack(plan).to(device)

    width = frames.shape[1]
    starts = torch.arange(width, device=device).expand(len(frames), width)
    frames = frames.float().masked_fill(~_valid(lengths, width)[..., None], 0.0)
    ends_at = lengths[:, None]
    for shorter, width in zip(rounds, widths, strict=True):
        with torch.no_grad():
            density = density_fn(frames.to(dtype)).detach().to(device, torch.float32)
            sizes = span_sizes(similarities(frames), lengths, shorter, width)
        starts = starts.gather(1, (sizes.cumsum(1) - sizes).clamp(max=starts.shape[1] - 1)[:, :width])
        fused = weighted_means(frames, density, sizes)[:, :width]
        frames = torch.where((shorter < lengths)[:, None, None], fused, frames[:, :width])
        lengths = shorter

    valid = _valid(lengths, width)
    starts = torch.where(valid, starts, ends_at)
    spans = torch.stack((starts, torch.cat((starts[:, 1:], ends_at), dim=1)), dim=-1)
    return FusedFrames(frames.to(dtype), lengths, spans)


def content_density(ctc_logits: Tensor) -> Tensor:
    """Eq. 3: the probability, float32, that a frame `(..., V + 1)` carries text: that of all but the blank (last).

    The softmax is taken in float32: `logsumexp` of neighbouring terms has an absolute error that reorders densities
    near 0.
    """
    return 1.0 - ctc_logits.softmax(dim=-1, dtype=torch.float32)[..., -1]


def similarities(frames: Tensor) -> Tensor:
    """Eq. 4: cosine similarity `(B, T - 1)` of every frame of `(B, T, D)` and the next; 0 for a zero frame."""
    norms = torch.linalg.vector_norm(frames, dim=-1)
    products = (frames[:, :-1] * frames[:, 1:]).sum(dim=-1)
    return products / (norms[:, :-1] * norms[:, 1:]).clamp(min=1e-16)


def next_lengths(lengths: Tensor, targets: Tensor, schedule: str, ladder: Sequence[int]) -> Tensor:
    """Eq. 5: T(m+1), the lengths `(B,)` after the next round, for lengths T(m) and target lengths L `(B,)`.

    Halving: half of T(m), rounded down, while T(m) > 2L, then L. Ladder: the highest rung between L and T(m), then L.

    Raises:
        ValueError: the schedule is unknown.
    """
    if schedule == "halving":
        shorter = torch.where(lengths > 2 * targets, lengths // 2, targets)
    elif schedule == "ladder":
        rungs = torch.tensor(ladder, dtype=lengths.dtype, device=lengths.device).expand(len(lengths), -1)
        between = (rungs < lengths[:, None]) & (rungs > targets[:, None])
        shorter = torch.cat((targets[:, None], torch.where(between, rungs, 0)), dim=1).amax(1)
    else:
        raise ValueError(f"fusion schedule must be halving or ladder, got {schedule!r}.")
    return torch.minimum(shorter, lengths)


def span_sizes(similarity: Tensor, lengths: Tensor, shorter: Tensor, width: int) -> Tensor:
    """Returns how many frames each span holds, `(B, width + 1)`; the last column counts the padding.

    The r(m) = T(m) - T(m+1) (Eq. 6) most similar pairs are glued; of equally similar ones the earlier.

    Args:
        similarity: Eq. 4, `(B, T - 1)`.
        lengths: T(m), `(B,)`.
        shorter: T(m+1), `(B,)`.
        width: the largest of `shorter`.
    """
    batch, pairs = similarity.shape
    order = torch.arange(pairs + 1, device=similarity.device).expand(batch, -1)
    valid = order < lengths[:, None]
    ranking = similarity.masked_fill(~valid[:, 1:], -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.zeros_like(ranking).scatter(1, ranking, order[:, 1:] - 1)
    glued = F.pad(rank < (lengths - shorter)[:, None], (1, 0))  # to its left neighbour
    span = (valid & ~glued).cumsum(1) - 1
    sizes = torch.zeros(batch, width + 1, dtype=torch.int64, device=similarity.device)
    return sizes.scatter_add(1, torch.where(valid, span, width), torch.ones_like(span))


def weighted_means(frames: Tensor, density: Tensor, sizes: Tensor) -> Tensor:
    """Returns the density-weighted mean of every span, sum(d h) / (sum(d) + 1e-7), `(B, spans, D)`.

    A span whose densities are all 0 becomes its plain mean, an empty one zeros.

    Args:
        frames: h, `(B, T, D)` float32.
        density: d, `(B, T)` float32.
        sizes: frames of each span, `(B, spans)` int64, summing to T.
    """
    batch, width, dim = frames.shape
    flat_sizes = sizes.flatten()

    def span_sums(values: Tensor) -> Tensor:  # in the order of the frames, on every device (index_add_ is not)
        return torch.segment_reduce(values, "sum", lengths=flat_sizes, unsafe=True)

    density = density.flatten()
    silent = (span_sums(density) == 0).repeat_interleave(flat_sizes, output_size=batch * width)
    density = density.masked_fill(silent, 1.0)
    means = span_sums(frames.reshape(-1, dim) * density[:, None]) / (span_sums(density) + 1e-7)[:, None]
    return means.unflatten(0, (batch, -1))


def _valid(lengths: Tensor, width: int) -> Tensor:
    return torch.arange(width, device=lengths.device) < lengths[:, None]


# Every way to shorten a recording, by the name that `compression` takes; all have the signature of `iterative_fusion`.
COMPRESSIONS = {"iterative_fusion": iterative_fusion}

__all__ = ["COMPRESSIONS", "FusedFrames", "content_density", "iterative_fusion"]
