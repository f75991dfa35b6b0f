"""Iterative fusion against a loop written straight from Eq. 3-6, and what it promises beyond them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastlongspeech.fusion_fastlongspeech import (
    FusedFrames,
    FusionSettings,
    content_density,
    iterative_fusion,
    next_lengths,
)

LADDER = (400, 200, 100, 50, 25, 12)
Density = Callable[[Tensor], Tensor]


def random_density(dim: int) -> Density:
    weight = torch.randn(9, dim)
    return lambda frames: content_density(frames @ weight.to(frames.dtype).T)


def uniform(frames: Tensor) -> Tensor:
    return torch.ones(frames.shape[:-1])


def fuse_by_the_book(
    recording: Tensor, target_length: int, density_fn: Density, schedule: str
) -> tuple[Tensor, list[list[int]]]:
    """Eq. 3-6 for one recording `(T, D)`: its frames, and the frames of the recording that each stands for."""
    dtype = recording.dtype
    frames = [frame.double() for frame in recording]
    members = [[t] for t in range(len(frames))]
    while len(frames) > target_length:
        length = len(frames)
        if schedule == "halving":
            shorter = length // 2 if length > 2 * target_length else target_length  # Eq. 5
        else:
            shorter = max([rung for rung in LADDER if target_length < rung < length], default=target_length)
        density = density_fn(torch.stack(frames).to(dtype)[None])[0]  # Eq. 3
        similarity = [  # Eq. 4
            float(frames[t] @ frames[t + 1] / (frames[t].norm() * frames[t + 1].norm())) for t in range(length - 1)
        ]
        pairs = sorted(range(length - 1), key=lambda t: -similarity[t])[: length - shorter]  # Eq. 6
        spans: list[list[int]] = []
        for t in range(length):
            if t - 1 in pairs:
                spans[-1].append(t)
            else:
                spans.append([t])
        weights = [[float(density[t]) for t in span] for span in spans]
        frames = [
            sum((w * frames[t] for w, t in zip(weight, span, strict=True)), torch.zeros(())) / sum(weight)
            for weight, span in zip(weights, spans, strict=True)
        ]
        members = [[member for t in span for member in members[t]] for span in spans]
    return torch.stack(frames).to(dtype), members


def members_of(fused: FusedFrames, row: int) -> list[list[int]]:
    return [list(range(start, end)) for start, end in fused.spans[row, : fused.lengths[row]].tolist()]


@pytest.mark.parametrize("schedule", ["halving", "ladder"])
@pytest.mark.parametrize(
    ("lengths", "target_length", "dim"),
    [
        ([2], 1, 3),
        ([60, 7, 1], 1, 8),
        ([97, 64, 13], 13, 5),
        ([130, 26, 25, 24], 25, 16),
        ([111, 40], 30, 4),
        ([240, 239], 11, 8),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_book(schedule: str, lengths: list[int], target_length: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    density_fn = random_density(dim)
    frames = torch.randn(len(lengths), max(lengths), dim).to(dtype)
    fused = iterative_fusion(
        frames, torch.tensor(lengths), target_length, FusionSettings(density_fn, schedule, LADDER)
    )
    assert fused.frames.dtype == dtype
    assert fused.lengths.tolist() == [min(n, target_length) for n in lengths]
    for row, n in enumerate(lengths):
        expected, members = fuse_by_the_book(frames[row, :n], target_length, density_fn, schedule)
        assert members_of(fused, row) == members
        tolerance = max(1e-4, 2 * torch.finfo(dtype).eps)
        torch.testing.assert_close(fused.frames[row, : len(expected)], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("schedule", ["halving", "ladder"])
@pytest.mark.parametrize("target_length", [1, 5, 12, 33, 50, 119, 120, 121])
def test_meets_any_length_with_spans_that_cover_the_recording(schedule: str, target_length: int) -> None:
    torch.manual_seed(0)
    fused = iterative_fusion(
        torch.randn(1, 120, 4), torch.tensor([120]), target_length, FusionSettings(random_density(4), schedule, LADDER)
    )
    assert fused.frames.shape == (1, min(120, target_length), 4)
    assert [t for span in members_of(fused, 0) for t in span] == list(range(120))


def test_the_rounds_of_both_schedules() -> None:
    """Eq. 5 halves while T > 2L; the ladder steps on the rungs below T and then on L itself."""

    def rounds(length: int, target_length: int, schedule: str) -> list[int]:
        begins: list[int] = []
        while length > target_length:
            begins.append(length)
            length = int(next_lengths(torch.tensor([length]), torch.tensor([target_length]), schedule, LADDER))
        return begins

    assert rounds(1175, 200, "halving") == [1175, 587, 293]
    assert rounds(400, 200, "halving") == [400]
    assert rounds(403, 200, "halving") == [403, 201]
    assert rounds(750, 30, "ladder") == [750, 400, 200, 100, 50]
    assert rounds(400, 12, "ladder") == [400, 200, 100, 50, 25]
    assert rounds(11, 5, "ladder") == [11]
    assert rounds(750, 750, "ladder") == rounds(3, 9, "halving") == []


def test_a_cpu_weighs_every_frame_once() -> None:
    """A frame that is glued to no other in a round is not weighed again, and padding is not weighed at all."""
    torch.manual_seed(0)
    asked: list[Tensor] = []

    def density(frames: Tensor) -> Tensor:
        asked.append(frames.flatten(0, 1))
        return uniform(frames)

    iterative_fusion(torch.randn(2, 300, 4), torch.tensor([300, 190]), 20, FusionSettings(density))
    assert [len(frames) for frames in asked[:1]] == [490] and len(asked) == 4
    weighed = torch.cat(asked)
    assert len(weighed.unique(dim=0)) == len(weighed)


def test_a_recording_is_fused_in_a_batch_as_alone() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([90, 200, 31, 5, 64])
    frames, density_fn = torch.randn(5, 200, 6), random_density(6)
    for row, n in enumerate(lengths.tolist()):
        frames[row, n:] = torch.nan  # what lies in the padding is nobody's business
    targets = torch.tensor([7, 31, 31, 31, 63])
    batch = iterative_fusion(frames, lengths, targets, FusionSettings(density_fn))
    for row, n in enumerate(lengths.tolist()):
        one = frames[row : row + 1, :n], lengths[row : row + 1], int(targets[row])
        alone = iterative_fusion(*one, FusionSettings(density_fn))
        assert members_of(batch, row) == members_of(alone, 0)
        torch.testing.assert_close(batch.frames[row, : alone.frames.shape[1]], alone.frames[0], rtol=0, atol=1e-6)
        assert not batch.frames[row, alone.frames.shape[1] :].any()


def test_a_short_recording_is_left_alone_even_beside_a_long_one() -> None:
    frames = torch.randn(2, 100, 4)
    fused = iterative_fusion(
        frames, torch.tensor([100, 9]), 10, FusionSettings(lambda h: torch.full(h.shape[:-1], 1e-7))
    )
    assert torch.equal(fused.frames[1, :9], frames[1, :9])
    assert members_of(fused, 1) == [[t] for t in range(9)]


def test_of_equal_similarities_the_earlier_is_glued() -> None:
    fused = iterative_fusion(torch.ones(1, 8, 3), torch.tensor([8]), 5, FusionSettings(uniform))
    assert members_of(fused, 0) == [[0, 1, 2, 3], [4], [5], [6], [7]]


def test_silent_spans_become_plain_means_and_zero_frames_stay_zero() -> None:
    torch.manual_seed(0)
    frames = torch.randn(1, 64, 4)
    fused = iterative_fusion(frames, torch.tensor([64]), 32, FusionSettings(lambda h: torch.zeros(h.shape[:-1])))
    means = [frames[0, span].mean(0) for span in members_of(fused, 0)]
    torch.testing.assert_close(fused.frames[0], torch.stack(means), rtol=1e-5, atol=1e-6)

    zeros = iterative_fusion(
        torch.zeros(1, 64, 4), torch.tensor([64]), 3, FusionSettings(lambda h: torch.zeros(h.shape[:-1]))
    )
    assert torch.equal(zeros.frames, torch.zeros(1, 3, 4))


def test_gradients_are_the_weights_of_the_frames_and_do_not_reach_the_density() -> None:
    torch.manual_seed(0)
    frames = torch.randn(1, 20, 1, requires_grad=True)
    density = torch.rand(1, 20, requires_grad=True)
    fused = iterative_fusion(frames, torch.tensor([20]), 12, FusionSettings(lambda _: density))
    fused.frames.sum().backward()
    expected = torch.cat([density[0, span] / density[0, span].sum() for span in members_of(fused, 0)])
    assert frames.grad is not None
    torch.testing.assert_close(frames.grad[0, :, 0], expected.detach(), rtol=1e-5, atol=1e-6)
    assert density.grad is None


def test_lone_half_precision_frames_do_not_overflow() -> None:
    frames = torch.full((1, 400, 4), 60000.0, dtype=torch.float16)
    fused = iterative_fusion(frames, torch.tensor([400]), 1, FusionSettings(uniform))
    assert torch.equal(fused.frames, frames[:, :1])


def test_content_density_is_accurate_near_zero() -> None:
    logits = torch.randn(50, 30) * 3
    logits[:, -1] += 12  # the blank
    exact = 1 - logits.double().softmax(-1)[:, -1]
    torch.testing.assert_close(content_density(logits).double(), exact, rtol=0, atol=3e-7)
    assert content_density(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("target_length", [0, -3])
def test_refuses_lengths_below_one(target_length: int) -> None:
    with pytest.raises(ValueError, match=f"target_length must be a positive integer, got {target_length}"):
        iterative_fusion(torch.randn(1, 4, 2), torch.tensor([4]), target_length, FusionSettings(uniform))


def test_refuses_an_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="halving or ladder, got 'thirds'"):
        iterative_fusion(torch.randn(1, 4, 2), torch.tensor([4]), 2, FusionSettings(uniform, "thirds"))
