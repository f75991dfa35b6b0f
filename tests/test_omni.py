"""Omni's thinkers as hosts: what they hear is what the stock models hear, at any length and any duration."""

from typing import Any

import pytest
import torch
from test_fusion import fuse_by_the_book
from tiny_omni import OMNIS, Omni, make_audio, make_prompts
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

Inputs = dict[str, Tensor]
NEW = 6


@pytest.fixture(params=OMNIS)
def omni(request: pytest.FixtureRequest) -> Omni:
    return OMNIS[request.param]


@pytest.fixture
def stock(omni: Omni) -> Any:
    return omni.make_stock()


@pytest.fixture
def model(omni: Omni, stock: Any) -> Any:
    return omni.make_model(stock)


def answer(model: Any, inputs: Inputs, **options: Any) -> list[list[int]]:
    """The new tokens of greedy search; what comes before them has to be the caller's ids."""
    out = model.generate(**inputs, **({"max_new_tokens": NEW, "do_sample": False} | options))
    width = inputs["input_ids"].shape[1]
    copies = len(out) // len(inputs["input_ids"])
    assert torch.equal(out[:, :width], inputs["input_ids"].repeat_interleave(copies, dim=0))
    return out[:, width:].tolist()


# Frames


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_frames_are_those_of_the_stock_tower(omni: Omni, stock: Any, model: Any, attention: str) -> None:
    """Recordings of one window and of several, with a last one that is whole, short, odd, or too short for a frame."""
    for one in (stock, model):
        one.model.audio_tower.set_attn_implementation(attention)
    size = omni.window
    mels = (730, size, 2001, 5, 2 * size + 2, 99, 1)
    counts = [omni.frames_of(mel) for mel in mels]
    audio = make_audio(*mels)
    before_norm: list[Tensor] = []
    stock.model.audio_tower.ln_post.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    embeddings = stock.get_audio_features(**audio).last_hidden_state
    recordings = model.encode(**audio)
    assert recordings.lengths.tolist() == counts
    torch.testing.assert_close(recordings.frames, before_norm[0], rtol=0, atol=1e-5)
    projected = omni.project(model.model.audio_tower, model.model.normalise(recordings.frames))
    torch.testing.assert_close(projected, embeddings, rtol=0, atol=1e-5)
    heard = model.get_audio_features(**audio, compression="none")
    torch.testing.assert_close(heard.pooler_output, embeddings, rtol=0, atol=1e-5)


def test_frames_follow_each_other_over_the_ends_of_windows(omni: Omni, model: Any) -> None:
    spans = model.get_audio_features(**make_audio(2001), compression="none").spans
    assert torch.equal(spans[1:, 0], spans[:-1, 1])
    width = 0.04 if omni.window == 200 else 0.08  # of a second's last frame of 13 it is half as much
    torch.testing.assert_close(spans[:12], torch.stack((torch.arange(12), torch.arange(1, 13)), dim=1) * width)
    assert float(spans[-1, 1]) == pytest.approx(20.0 if omni.window == 200 else 20.08)


def test_features_in_windows_and_a_row_for_each_recording_are_the_same(omni: Omni, model: Any) -> None:
    audio, size = make_audio(730, 2001), omni.window
    counts = [-(-730 // size), -(-2001 // size)]
    mask = torch.nn.functional.pad(audio["feature_attention_mask"], (0, 7 * size))
    whole = torch.nn.functional.pad(audio["input_features"], (0, 7 * size)) * mask[:, None]
    places = [(row, size * number) for row, count in enumerate(counts) for number in range(count)]
    in_windows = {
        "input_features": torch.stack([whole[row, :, start : start + size] for row, start in places]),
        "feature_attention_mask": torch.stack([mask[row, start : start + size] for row, start in places]),
        "windows_per_audio": torch.tensor(counts),
    }
    rows, windows = model.encode(**audio), model.encode(**in_windows)
    assert torch.equal(rows.frames, windows.frames) and torch.equal(rows.lengths, windows.lengths)
    assert rows.audio == windows.audio


@torch.no_grad()
@pytest.mark.parametrize("target_length", [1, 33, 94])
def test_fused_frames_are_those_of_a_loop_over_the_stock_frames(
    omni: Omni, stock: Any, model: Any, target_length: int
) -> None:
    audio = make_audio(730)
    tower, before_norm = stock.model.audio_tower, []
    tower.ln_post.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    stock.get_audio_features(**audio)

    def density(frames: Tensor) -> Tensor:
        return 1 - model.model.ctc_decoder(tower.ln_post(frames)).softmax(-1)[..., -1]

    fused, members = fuse_by_the_book(before_norm[0], target_length, density, "halving")
    heard = model.get_audio_features(**audio, target_length=target_length)
    torch.testing.assert_close(heard.pooler_output, omni.project(tower, tower.ln_post(fused)), rtol=1e-4, atol=1e-4)
    each = model.encode(**audio)
    seconds = [[each.starts[span[0]], each.ends[span[-1]]] for span in members]
    torch.testing.assert_close(heard.spans, torch.tensor(seconds).float())


@torch.no_grad()
def test_a_batch_of_recordings_equals_each_alone(model: Any) -> None:
    mels, targets = (730, 4, 1500, 190), [50, 3, 175, 7]
    audio = make_audio(*mels)
    batch = model.get_audio_features(**audio, target_length=targets)
    assert batch.audio_lengths.tolist() == [50, 1, 175, 7]
    for row, heard in enumerate(batch.pooler_output.split(batch.audio_lengths.tolist())):
        one = {name: tensor[row : row + 1, ..., : mels[row]] for name, tensor in audio.items()}
        alone = model.get_audio_features(**one, target_length=targets[row])
        torch.testing.assert_close(alone.pooler_output, heard, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("minutes", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_recording_twice_as_long_is_twice_the_work_in_batches_no_larger(
    omni: Omni, model: Any, minutes: int
) -> None:
    """The stock path calls attention once for every window of 2 s (8 s) in each layer; here it is once a minute."""
    shapes: list[tuple[int, ...]] = []
    layer = model.model.audio_tower.layers[0]
    layer.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    work = []
    for length in (minutes, 2 * minutes):
        shapes.clear()
        with FlopCounterMode(display=False) as counter:
            recordings = model.encode(**make_audio(length * 6000))
        assert recordings.lengths.tolist() == [omni.frames_of(length * 6000)]
        whole = omni.frames_of(omni.window) * (2 if omni.window == 200 else 1)  # before the pooling
        assert {positions for _, positions in shapes} <= {whole, whole // 2}
        assert sum(windows for windows, _ in shapes) == length * 6000 / omni.window
        assert max(windows for windows, _ in shapes) == 6000 // omni.window and len(shapes) <= length * 8 / 7 + 2
        work.append(counter.get_total_flops())
    assert work[1] == pytest.approx(2 * work[0], rel=0.02)


# Prompts


@torch.no_grad()
def test_every_frame_gives_the_logits_of_the_stock_model(omni: Omni, stock: Any, model: Any) -> None:
    """Two recordings in one prompt, one in another, with padding on the left."""
    mels = (730, 333, 1000)
    frames = [omni.frames_of(mel) for mel in mels]
    inputs = make_audio(*mels) | make_prompts(frames[:2], frames[2:])
    expected, found = stock(**inputs).logits, model(**inputs, compression="none").logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert answer(model, inputs, compression="none") == answer(stock, inputs)
    assert answer(model, make_audio(*mels) | make_prompts([1, 1], [1]), compression="none") == answer(stock, inputs)


@torch.no_grad()
def test_a_length_in_generate_equals_the_length_prepared(model: Any) -> None:
    audio = make_audio(730, 4, 2500)
    prepared = answer(model, audio | make_prompts([30, 1], [44]))
    for lengths in ([30, 5, 44], torch.tensor([30, 1, 44])):
        assert answer(model, audio | make_prompts([100, 2], [7]), target_length=lengths) == prepared
    beams = answer(model, audio | make_prompts([100, 1], [7]), target_length=[30, 1, 44], num_beams=3)
    assert beams == answer(model, audio | make_prompts([30, 1], [44]), num_beams=3)


@torch.no_grad()
def test_a_batch_answers_as_one_by_one(model: Any) -> None:
    mels = (730, 2500, 190)
    audio = make_audio(*mels)
    together = answer(model, audio | make_prompts([9], [9], [9]), target_length=20)
    for row, mel in enumerate(mels):
        one = {name: tensor[row : row + 1, ..., :mel] for name, tensor in audio.items()}
        prompt = make_prompts([9], [9], [9])["input_ids"][row : row + 1]
        assert answer(model, one | {"input_ids": prompt}, target_length=20) == [together[row]]


@torch.no_grad()
def test_several_turns(model: Any) -> None:
    """A second question after a first answer, once from the start, once from the first turn's cache."""
    audio = make_audio(900)
    options: dict[str, Any] = {"target_length": 20, "do_sample": False}
    first = model.generate(**audio, **make_prompts([50]), **options, max_new_tokens=3, return_dict_in_generate=True)
    ids = torch.cat((first.sequences, torch.tensor([[12, 13, 14]])), dim=1)
    from_start = answer(model, audio | {"input_ids": ids}, **options)
    assert from_start == answer(model, audio | {"input_ids": ids}, **options, past_key_values=first.past_key_values)
    recordings = model.encode(**audio)
    assert from_start == answer(model, {"input_ids": ids}, recordings=recordings, **options)
    both = torch.cat((ids, make_prompts([20])["input_ids"]), dim=1)
    assert len(answer(model, make_audio(900, 80) | {"input_ids": both}, target_length=15)[0]) == NEW
