"""Iterative fusion (Eq. 3-6 of the paper): a recording's frames, shortened to any length in a few rounds.

In each round the most similar neighbours are glued together (Eq. 4), as many as the next length asks for (Eq. 5, 6),
and every span of glued frames becomes its mean, weighted by content density (Eq. 3). All functions here take padded
batches, have no parameters and loop over rounds alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DensityFunction = Callable[[Tensor], Tensor]
WeightsFunction = Callable[[Tensor, Tensor], Tensor]
PairsFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


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


class FusionSettings(NamedTuple):
    """What a compression may ask for beside frames and lengths.

    Attributes:
        density: content density (Eq. 3) `(B', T')` of frames `(B', T', D)`; autograd treats it as a constant.
        schedule: `"halving"` or `"ladder"`, see `next_lengths`.
        ladder: the rungs of the ladder schedule, in frames.
    """

    density: DensityFunction
    schedule: str = "halving"
    ladder: Sequence[int] = ()


def iterative_fusion(frames: Tensor, lengths: Tensor, targets: int | Tensor, settings: FusionSettings) -> FusedFrames:
    """Fuses each recording to its target length; one that has no more frames is left alone.

    A recording's result does not depend on the others in the batch. Sums are accumulated in float32 in a fixed order.

    Args:
        frames: `(B, T, D)` floating point; what lies past a recording's length is ignored.
        lengths: `(B,)` integer, valid frames of each recording.
        targets: L, 1 or more; one for all or `(B,)`.
        settings: the density, asked again for the fused frames in every round (see `renew_weights`), and the schedule.

    Raises:
        ValueError: a target length is below 1, or the schedule is unknown.
    """
    targets = check_target_length(targets, len(frames))
    # Lengths are all that a plan needs, so it is made before the first round: the host waits for the device just here.
    plan = [lengths.to("cpu", torch.int64)]
    while bool((plan[-1] > targets).any()):
        plan.append(next_lengths(plan[-1], targets, settings.schedule, settings.ladder))
    return fuse(frames, plan, lambda fused, _: settings.density(fused), most_similar_pairs)


def fuse(frames: Tensor, plan: list[Tensor], weights_fn: WeightsFunction, pairs_fn: PairsFunction) -> FusedFrames:
    """Fuses recordings in rounds, each from the lengths of `plan` to those that come next in it.

    Args:
        frames: `(B, T, D)` floating point; what lies past a recording's length is ignored.
        plan: the lengths `(B,)` int64 on the CPU, at first and after every round.
        weights_fn: weights `(B', T')` of frames `(B', T', D)`, in the dtype of `frames`, each of which stands for a
            number `(B', T')` of the recording's own; see `renew_weights`. Autograd treats them as constants.
        pairs_fn: chooses the neighbours to glue, as `most_similar_pairs` does.
    """
    device, dtype = frames.device, frames.dtype
    # Widths are read on the CPU, where the plan is: reading them off the device would make the host wait every round.
    widths = [int(shorter.max()) for shorter in plan[1:]]
    lengths, *rounds = torch.stack(plan).to(device)
    ends_at = lengths[:, None]
    width = frames.shape[1]
    # Only where each span starts is kept; it ends where the next one starts, the last one at the recording's end.
    starts = torch.arange(width, device=device).minimum(ends_at)
    frames = frames.float()  # means of means: sums in half precision would lose small densities
    if bool((plan[0] < width).any()):
        # What lies in the padding may be NaN, and NaN times a weight of 0 is NaN.
        frames = frames.masked_fill(~valid_positions(lengths, width)[..., None], 0.0)
    weights, fresh = torch.zeros_like(starts, dtype=torch.float32), valid_positions(lengths, width)
    for shorter, width in zip(rounds, widths, strict=True):
        with torch.no_grad():  # which frames are glued, and what they weigh, are constants; gradients pass the means
            members = torch.diff(starts, append=ends_at)
            weights = renew_weights(weights, fresh, frames.to(dtype), members, weights_fn)
            glued = pairs_fn(similarities(frames), lengths, lengths - shorter)
            sizes = span_sizes(glued, lengths, width)
            # The place of each span's first frame; clamped where a recording has fewer spans than the widest.
            first = (sizes.cumsum(1) - sizes).clamp(max=starts.shape[1] - 1)[:, :width]
        starts = torch.where(valid_positions(shorter, width), starts.gather(1, first), ends_at)
        fused = weighted_means(frames, weights, sizes)[:, :width]
        # A recording that is short enough already keeps its frames to the bit: means of one would round them.
        frames = torch.where((shorter < lengths)[:, None, None], fused, frames[:, :width])
        weights, fresh = weights.gather(1, first), sizes[:, :width] > 1
        lengths = shorter
    spans = torch.stack((starts, torch.cat((starts[:, 1:], ends_at), dim=1)), dim=-1)
    return FusedFrames(frames.to(dtype), lengths, spans)


def renew_weights(
    weights: Tensor, fresh: Tensor, frames: Tensor, members: Tensor, weights_fn: WeightsFunction
) -> Tensor:
    """Returns the weights `(B, T)`, float32, of the frames of a round.

    A frame that was glued to no other in the round before keeps its weight. On a CPU `weights_fn` is asked, as for one
    row, for the fresh frames alone. Elsewhere it is asked for all: counting the fresh ones would force a GPU to
    synchronise with the host.

    Args:
        weights: of the same frames in the round before, `(B, T)` float32; on a CPU they are changed in place.
        fresh: which frames are means that the round before has made, `(B, T)` bool; in the first all that are valid.
        frames: `(B, T, D)`.
        members: how many of the recording's frames each stands for, `(B, T)`.
        weights_fn: see `fuse`.
    """
    if frames.device != torch.device("cpu"):
        return torch.where(fresh, weights_fn(frames, members).detach().to(weights), weights)
    weights[fresh] = weights_fn(frames[fresh][None], members[fresh][None])[0].detach().to(weights)
    return weights


def check_target_length(target_length: Any, recordings: int) -> Tensor:
    """Returns L of every recording, `(A,)` int64 on the CPU: the one place that says what a target length may be.

    Args:
        target_length: an integer for all recordings, or one for each (a list, an array or a tensor).
        recordings: A.

    Raises:
        ValueError: a length is not a positive integer, or there are more or fewer than recordings.
    """
    values = target_length.cpu().numpy() if isinstance(target_length, Tensor) else np.asarray(target_length)
    if values.dtype.kind not in "iu" or (values < 1).any():
        raise ValueError(
            f'target_length must be a positive integer, got {target_length!r}; pass compression="none" to keep every '
            "frame."
        )
    if values.ndim > 1 or (values.ndim and len(values) != recordings):
        raise ValueError(
            f"target_length must be one integer for all recordings or one for each, got {values.size} integers for "
            f"{recordings} recordings."
        )
    return torch.from_numpy(np.broadcast_to(values.astype(np.int64), recordings).copy())


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


def most_similar_pairs(similarity: Tensor, lengths: Tensor, count: Tensor) -> Tensor:
    """Returns which frames are glued to their left neighbour, `(B, T - 1)` bool: the r most similar pairs.

    Args:
        similarity: Eq. 4, `(B, T - 1)`.
        lengths: T(m), `(B,)`.
        count: r(m) = T(m) - T(m+1) (Eq. 6), `(B,)`.
    """
    return similarity_ranks(similarity, lengths) < count[:, None]


def similarity_ranks(similarity: Tensor, lengths: Tensor) -> Tensor:
    """Returns the places of pairs `(B, T - 1)` in the order of falling similarity, 0 the most similar.

    Of equally similar pairs the earlier comes first; pairs that touch the padding come last.
    """
    pairs = torch.arange(similarity.shape[1], device=similarity.device).expand_as(similarity)
    valid = pairs + 1 < lengths[:, None]
    ranking = similarity.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(ranking).scatter(1, ranking, pairs)


def span_sizes(glued: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Returns how many frames each span holds, `(B, width + 1)`; the last column counts the padding.

    Args:
        glued: which frames are glued to their left neighbour, `(B, T - 1)` bool.
        lengths: `(B,)`, valid frames.
        width: the most spans a recording has.
    """
    valid = valid_positions(lengths, glued.shape[1] + 1)
    span = (valid & ~F.pad(glued, (1, 0))).cumsum(1) - 1
    sizes = torch.zeros(len(span), width + 1, dtype=torch.int64, device=span.device)
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
    spans = torch.arange(len(flat_sizes), device=frames.device)
    span_of = spans.repeat_interleave(flat_sizes, output_size=batch * width)

    def span_sums(values: Tensor) -> Tensor:  # in the order of the frames, which CUDA's index_add_ does not keep
        if values.is_cuda:
            return torch.segment_reduce(values, "sum", lengths=flat_sizes, unsafe=True)
        return values.new_zeros(len(flat_sizes), *values.shape[1:]).index_add_(0, span_of, values)

    density = density.flatten()
    density = density.masked_fill((span_sums(density) == 0).gather(0, span_of), 1.0)
    means = span_sums(frames.reshape(-1, dim) * density[:, None]) / (span_sums(density) + 1e-7)[:, None]
    return means.unflatten(0, (batch, -1))


def valid_positions(lengths: Tensor, width: int) -> Tensor:
    """Returns which of `width` positions lie within lengths `(B,)`, `(B, width)` bool."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


__all__ = ["FusedFrames", "FusionSettings", "check_target_length", "content_density", "iterative_fusion"]
