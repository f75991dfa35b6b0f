"""Every way to shorten a recording, by the name that `compression` takes: iterative fusion, its rivals and ablations.

All are functions of `(frames, lengths, targets, settings)`, return exactly L frames of a recording that has more and
leave the others alone, give a recording in a batch what it gets alone, and accumulate in float32. Settings that a
method has no use for (the density, the schedule) it ignores. `"none"`, every frame, is no function. Nor is
`"summary"`, which fuses frames and leaves the rest to the language model, see `summary_fastlongspeech.py`.
"""

import torch
from torch import Tensor

from .fusion_fastlongspeech import (
    FusedFrames,
    FusionSettings,
    check_target_length,
    fuse,
    iterative_fusion,
    similarity_ranks,
    valid_positions,
    weighted_means,
)


def random_frames(frames: Tensor, lengths: Tensor, targets: int | Tensor, settings: FusionSettings) -> FusedFrames:
    """Keeps L frames chosen by chance, in order (the paper's Random); a span is the kept frame's own.

    Chance is a hash of the frame's number, seeded by the recording's own length: no generator is read or advanced. So
    a recording keeps the same frames in every batch, process and run and on every device, fewer of them for a smaller
    L; recordings of the same length keep the same places.
    """
    width = frames.shape[1]
    kept = torch.minimum(lengths.to("cpu", torch.int64), check_target_length(targets, len(frames)))
    most = int(kept.max())
    lengths, kept = lengths.to(frames.device, torch.int64)[:, None], kept.to(frames.device)
    numbers = torch.arange(width, device=frames.device)
    chance = _hash(_hash(lengths) + numbers).masked_fill(numbers >= lengths, 2**32)
    valid = valid_positions(kept, most)
    chosen = chance.argsort(dim=1)[:, :most].masked_fill(~valid, width).sort(dim=1).values
    index = chosen.clamp(max=width - 1)[..., None].expand(-1, -1, frames.shape[2])
    spans = torch.stack((chosen, chosen + 1), dim=-1).minimum(lengths[..., None])
    return FusedFrames(frames.gather(1, index).masked_fill(~valid[..., None], 0.0), kept, spans)


def average_pooling(frames: Tensor, lengths: Tensor, targets: int | Tensor, settings: FusionSettings) -> FusedFrames:
    """Averages L segments of T / L frames, rounded up or down (the paper's AvgPool): segment i begins at i T / L."""
    kept = torch.minimum(lengths.to("cpu", torch.int64), check_target_length(targets, len(frames)))
    most = int(kept.max())
    lengths, kept = lengths.to(frames.device, torch.int64), kept.to(frames.device)
    segments = kept[:, None]
    bounds = torch.arange(most + 1, device=frames.device).minimum(segments) * lengths[:, None] // segments.clamp(min=1)
    sizes = torch.diff(bounds, append=torch.full_like(bounds[:, :1], frames.shape[1]))
    whole = frames.float().masked_fill(~valid_positions(lengths, frames.shape[1])[..., None], 0.0)
    means = weighted_means(whole, torch.ones_like(whole[..., 0]), sizes)[:, :most]
    means = torch.where((kept < lengths)[:, None, None], means, whole[:, :most])
    return FusedFrames(means.to(frames.dtype), kept, torch.stack((bounds[:, :-1], bounds[:, 1:]), dim=-1))


def most_similar(frames: Tensor, lengths: Tensor, targets: int | Tensor, settings: FusionSettings) -> FusedFrames:
    """Glues the T - L most similar neighbours in one round; spans become plain means (the paper's MostSim)."""
    return single_step_fusion(frames, lengths, targets, FusionSettings(_uniform))


def single_step_fusion(
    frames: Tensor, lengths: Tensor, targets: int | Tensor, settings: FusionSettings
) -> FusedFrames:
    """Iterative fusion without iterations: from T to L in one round (Table 2, "w/o Iterative Fusion")."""
    return iterative_fusion(frames, lengths, targets, settings._replace(schedule="ladder", ladder=()))


def uniform_density(frames: Tensor, lengths: Tensor, targets: int | Tensor, settings: FusionSettings) -> FusedFrames:
    """Iterative fusion whose spans become plain means in every round (Table 2, "w/o Content Density")."""
    return iterative_fusion(frames, lengths, targets, settings._replace(density=_uniform))


def adjacent_merging(frames: Tensor, lengths: Tensor, targets: int | Tensor, settings: FusionSettings) -> FusedFrames:
    """Merges pairs of neighbours, the most similar first and no frame in two pairs, round by round (A-ToMe).

    A frame weighs as many as it stands for, so in the end every span is the plain mean of its recording's frames. A
    round takes (T - 1) / 3 pairs, rounded up, or the T - L that are left: so many there always are. After Li et al.,
    "Accelerating Transducers through Adjacent Token Merging" (2023), which compares the keys inside an encoder.
    """
    targets = check_target_length(targets, len(frames))
    plan = [lengths.to("cpu", torch.int64)]
    while bool((plan[-1] > targets).any()):
        length = plan[-1]
        plan.append(torch.maximum(length - (length + 1) // 3, torch.minimum(length, targets)))
    return fuse(frames, plan, lambda _, members: members, disjoint_pairs)


def disjoint_pairs(similarity: Tensor, lengths: Tensor, count: Tensor) -> Tensor:
    """As `most_similar_pairs`, but a pair is passed over where one of its frames is in a more similar pair already.

    Going down from a peak of similarity, every second pair is taken. A pair in a valley lies below two peaks, and is
    taken only where both ways down take it. `count` is at most (T - 1) / 3, rounded up.
    """
    rank = similarity_ranks(similarity, lengths)

    def below_the_peak(rank: Tensor) -> Tensor:
        """How far the pairs lie to the right of the nearest one that is not less similar than its left neighbour."""
        place = torch.arange(rank.shape[1], device=rank.device).expand_as(rank)
        descends = torch.zeros_like(rank, dtype=torch.bool)
        descends[:, 1:] = rank[:, 1:] > rank[:, :-1]
        return place - place.masked_fill(descends, 0).cummax(dim=1).values

    # An odd number of steps below a peak: the pair before has taken a frame of this one.
    odd = (below_the_peak(rank) | below_the_peak(rank.flip(1)).flip(1)) & 1
    return similarity_ranks(similarity.masked_fill(odd.bool(), -torch.inf), lengths) < count[:, None]


def _uniform(frames: Tensor) -> Tensor:
    return torch.ones(frames.shape[:-1], device=frames.device)


def _hash(numbers: Tensor) -> Tensor:
    """Mixes the bits of integers, one to one below 2^32 (Thomas Mueller's hash); int64 in and out."""
    numbers = numbers & 0xFFFFFFFF
    for _ in range(2):
        numbers = ((numbers >> 16) ^ numbers) * 0x45D9F3B & 0xFFFFFFFF
    return (numbers >> 16) ^ numbers


COMPRESSIONS = {
    "iterative_fusion": iterative_fusion,
    "random": random_frames,
    "average_pooling": average_pooling,
    "most_similar": most_similar,
    "single_step_fusion": single_step_fusion,
    "uniform_density": uniform_density,
    "adjacent_merging": adjacent_merging,
}


def check_compression(compression: str) -> None:
    """Raises a ValueError unless `compression` is a name of `COMPRESSIONS`, `"summary"` or `"none"`."""
    if compression not in (*COMPRESSIONS, "summary", "none"):
        raise ValueError(f"compression must be one of {', '.join(COMPRESSIONS)}, summary, none; got {compression!r}.")


__all__ = ["COMPRESSIONS", "check_compression"]
