"""The rivals and ablations against loops written from their definitions, and what every compression promises."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlongspeech import FastLongSpeechConfig, FastLongSpeechForConditionalGeneration
from fastlongspeech.compression_fastlongspeech import COMPRESSIONS
from fastlongspeech.fusion_fastlongspeech import FusedFrames, FusionSettings, content_density

Density = Callable[[Tensor], Tensor]
Spans = list[tuple[int, int]]
Make = Callable[..., Any]

SHAPES = [([2], 1, 3), ([60, 7, 1], 1, 8), ([97, 64, 13], 13, 5), ([130, 26, 25, 24], 25, 16), ([111, 40], 30, 4)]


def random_density(dim: int) -> Density:
    weight = torch.randn(9, dim)
    return lambda frames: content_density(frames @ weight.to(frames.dtype).T)


def no_density(frames: Tensor) -> Tensor:
    raise AssertionError("this method has no use for the content density")


def similarity(frames: list[Tensor], t: int) -> float:
    return float(frames[t] @ frames[t + 1] / (frames[t].norm() * frames[t + 1].norm()))


def mean_of(frames: list[Tensor], weights: list[float]) -> Tensor:
    return sum((w * f for w, f in zip(weights, frames, strict=True)), torch.zeros(())) / sum(weights)


def one_round(frames: list[Tensor], shorter: int, weights: list[float]) -> tuple[list[Tensor], list[list[int]]]:
    """Glues the most similar neighbours: the frames left, and which of those given each stands for."""
    pairs = sorted(range(len(frames) - 1), key=lambda t: -similarity(frames, t))[: len(frames) - shorter]
    spans: list[list[int]] = []
    for t in range(len(frames)):
        if t - 1 in pairs:
            spans[-1].append(t)
        else:
            spans.append([t])
    return [mean_of([frames[t] for t in span], [weights[t] for t in span]) for span in spans], spans


def join(members: list[list[int]], spans: list[list[int]]) -> list[list[int]]:
    return [[member for t in span for member in members[t]] for span in spans]


def bit_mixer(number: int) -> int:
    """Thomas Mueller's hash of 32 bits."""
    for _ in range(2):
        number = ((number >> 16) ^ number) * 0x45D9F3B % 2**32
    return (number >> 16) ^ number


def by_hand(name: str, recording: Tensor, target_length: int, density_fn: Density) -> tuple[list[Tensor], Spans]:
    """One method on one recording `(T, D)` of more than L frames: the frames left, and the span of each."""
    frames, total = [frame.double() for frame in recording], len(recording)
    members = [[t] for t in range(total)]
    if name == "random":
        order = sorted(range(total), key=lambda t: bit_mixer((bit_mixer(total) + t) % 2**32))
        members = [[t] for t in sorted(order[:target_length])]
        frames = [frames[t] for [t] in members]
    elif name == "average_pooling":
        bounds = [i * total // target_length for i in range(target_length + 1)]
        members = [list(range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]
        frames = [torch.stack([frames[t] for t in segment]).mean(0) for segment in members]
    elif name == "most_similar":
        frames, members = one_round(frames, target_length, [1.0] * total)
    elif name == "single_step_fusion":
        frames, members = one_round(frames, target_length, density_fn(recording[None])[0].tolist())
    elif name == "uniform_density":
        while len(frames) > target_length:
            shorter = len(frames) // 2 if len(frames) > 2 * target_length else target_length  # Eq. 5
            frames, spans = one_round(frames, shorter, [1.0] * len(frames))
            members = join(members, spans)
    elif name == "adjacent_merging":
        while len(frames) > target_length:
            most = min(-((1 - len(frames)) // 3), len(frames) - target_length)
            merged: set[int] = set()
            for t in sorted(range(len(frames) - 1), key=lambda t: -similarity(frames, t)):
                if len(merged) < most and not {t - 1, t, t + 1} & merged:
                    merged.add(t)
            assert len(merged) == most
            spans = [[t, t + 1] if t in merged else [t] for t in range(len(frames)) if t - 1 not in merged]
            frames = [mean_of([frames[t] for t in span], [float(len(members[t])) for t in span]) for span in spans]
            members = join(members, spans)
    return frames, [(span[0], span[-1] + 1) for span in members]


def spans_of(fused: FusedFrames, row: int) -> Spans:
    return [(start, end) for start, end in fused.spans[row, : fused.lengths[row]].tolist()]


RIVALS = [name for name in COMPRESSIONS if name != "iterative_fusion"]  # that one has a file of its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "target_length", "dim"), SHAPES)
@pytest.mark.parametrize("name", RIVALS)
def test_equals_a_loop_over_frames(
    name: str, lengths: list[int], target_length: int, dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    density_fn = random_density(dim)
    frames = torch.randn(len(lengths), max(lengths), dim).to(dtype)
    given = density_fn if name == "single_step_fusion" else no_density
    fused = COMPRESSIONS[name](frames, torch.tensor(lengths), target_length, FusionSettings(given))
    assert fused.frames.dtype == dtype
    assert fused.lengths.tolist() == [min(n, target_length) for n in lengths]
    for row, n in enumerate(lengths):
        if n <= target_length:
            assert torch.equal(fused.frames[row, :n], frames[row, :n])
            assert spans_of(fused, row) == [(t, t + 1) for t in range(n)]
        else:
            expected, spans = by_hand(name, frames[row, :n], target_length, density_fn)
            assert spans_of(fused, row) == spans
            tolerance = max(1e-4, 2 * torch.finfo(dtype).eps)
            found = fused.frames[row, :target_length].double()
            torch.testing.assert_close(found, torch.stack(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_meets_every_length_with_spans_in_order_that_cover_the_recording(name: str) -> None:
    torch.manual_seed(0)
    frames, density_fn = torch.randn(1, 61, 4), random_density(4)
    for target_length in range(1, 63):
        fused = COMPRESSIONS[name](frames, torch.tensor([61]), target_length, FusionSettings(density_fn))
        kept = min(61, target_length)
        assert fused.frames.shape == (1, kept, 4) and fused.lengths.tolist() == [kept]
        within = [t for start, end in spans_of(fused, 0) for t in range(start, end)]
        assert all(start < end for start, end in spans_of(fused, 0))
        if name == "random":
            assert len(within) == kept and within == sorted(set(within)) and within[-1] < 61
        else:
            assert within == list(range(61))


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_recording_gets_in_a_batch_what_it_gets_alone(name: str) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([90, 200, 31, 5, 64])
    frames, density_fn = torch.randn(5, 210, 6), random_density(6)
    for row, n in enumerate(lengths.tolist()):
        frames[row, n:] = torch.nan  # what lies in the padding is nobody's business
    targets = torch.tensor([7, 31, 31, 31, 63])
    batch = COMPRESSIONS[name](frames, lengths, targets, FusionSettings(density_fn))
    for row, n in enumerate(lengths.tolist()):
        one = frames[row : row + 1, :n], lengths[row : row + 1], int(targets[row])
        alone = COMPRESSIONS[name](*one, FusionSettings(density_fn))
        assert spans_of(batch, row) == spans_of(alone, 0)
        torch.testing.assert_close(batch.frames[row, : alone.frames.shape[1]], alone.frames[0], rtol=0, atol=1e-6)
        assert not batch.frames[row, alone.frames.shape[1] :].any()
        assert (batch.spans[row, alone.frames.shape[1] :] == n).all()


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_recording_without_frames_is_left_alone_beside_another(name: str) -> None:
    fused = COMPRESSIONS[name](torch.randn(2, 9, 4), torch.tensor([0, 9]), 3, FusionSettings(random_density(4)))
    assert fused.lengths.tolist() == [0, 3]
    assert not fused.frames[0].any() and not fused.spans[0].any()


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_sums_do_not_overflow_half_precision_and_gradients_reach_the_frames(name: str) -> None:
    frames = torch.full((1, 400, 4), 60000.0, dtype=torch.float16)
    fused = COMPRESSIONS[name](frames, torch.tensor([400]), 1, FusionSettings(lambda h: torch.ones(h.shape[:-1])))
    assert torch.equal(fused.frames, frames[:, :1])
    frames = torch.randn(1, 30, 4, requires_grad=True)
    fused = COMPRESSIONS[name](frames, torch.tensor([30]), 7, FusionSettings(random_density(4)))
    fused.frames.sum().backward()
    assert frames.grad is not None
    torch.testing.assert_close(frames.grad.sum(1), torch.full((1, 4), 7.0), rtol=1e-4, atol=1e-4)  # of means


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_refuses_lengths_below_one(name: str) -> None:
    with pytest.raises(ValueError, match="target_length must be a positive integer, got 0"):
        COMPRESSIONS[name](torch.randn(1, 9, 4), torch.tensor([9]), 0, FusionSettings(random_density(4)))


def test_random_neither_reads_nor_advances_a_generator_and_keeps_frames_from_everywhere() -> None:
    frames = torch.randn(1, 4000, 2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = COMPRESSIONS["random"](frames, torch.tensor([4000]), 1000, FusionSettings(no_density))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = COMPRESSIONS["random"](frames, torch.tensor([4000]), 1000, FusionSettings(no_density))
    assert torch.equal(first.spans, again.spans)
    starts = first.spans[0, :, 0]
    for quarter in range(4):
        assert 200 < int(((starts >= 1000 * quarter) & (starts < 1000 * (quarter + 1))).sum()) < 300
    other = COMPRESSIONS["random"](frames[:, :3999], torch.tensor([3999]), 1000, FusionSettings(no_density))
    assert 150 < len(set(starts.tolist()) & set(other.spans[0, :, 0].tolist())) < 350  # by chance, 250
    fewer = COMPRESSIONS["random"](frames, torch.tensor([4000]), 10, FusionSettings(no_density))
    assert set(fewer.spans[0, :, 0].tolist()) < set(starts.tolist())


# In the model


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_generates_through_every_compression_by_argument_and_by_configuration(
    name: str, make_model: Make, make_audio: Make, make_prompts: Make
) -> None:
    model = make_model()
    inputs = make_audio([3000, 900], [700]) | make_prompts([20], [20])
    options = {"max_new_tokens": 4, "do_sample": False}
    by_argument = model.generate(**inputs, compression=name, target_length=20, **options)
    audio = model.get_audio_features(
        **make_audio([3000, 900], [700]), compression=name, target_length=torch.tensor([20, 20])
    )
    assert audio.audio_lengths.tolist() == [20, 20] and audio.pooler_output.isfinite().all()
    logits = model(**inputs, compression=name).logits
    model.config.compression = name
    assert torch.equal(model.generate(**inputs, **options), by_argument)
    assert torch.equal(model(**inputs).logits, logits)
    if name != "iterative_fusion":
        assert not torch.equal(model(**inputs, compression="iterative_fusion").logits, logits)


@pytest.mark.parametrize("name", [*COMPRESSIONS, "none"])
def test_a_configuration_keeps_its_compression(name: str, tmp_path: Path) -> None:
    FastLongSpeechConfig(compression=name).save_pretrained(tmp_path)
    assert FastLongSpeechConfig.from_pretrained(tmp_path).compression == name


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_the_processor_prepares_the_placeholders_of_every_compression(name: str, processor: Any) -> None:
    inputs = processor(
        text="<|AUDIO|>", audio=torch.zeros(16000), sampling_rate=16000, target_length=9, compression=name
    )
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == 9


def test_an_unknown_name_is_refused_by_the_names_there_are(
    model: FastLongSpeechForConditionalGeneration, make_audio: Make, make_prompts: Make, processor: Any
) -> None:
    names = ", ".join(COMPRESSIONS)
    sentence = f"compression must be one of {names}, summary, none; got 'zip'"
    for call in (
        lambda: model.generate(**make_audio([700]), **make_prompts([20]), compression="zip"),
        lambda: model(**make_audio([700]), **make_prompts([20]), compression="zip"),
        lambda: model.get_audio_features(**make_audio([700]), compression="zip"),
        lambda: processor(text="<|AUDIO|>", audio=torch.zeros(16000), sampling_rate=16000, compression="zip"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
