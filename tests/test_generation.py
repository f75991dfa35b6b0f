"""Generation: what transformers' own suite would ask, and lengths that are chosen when it is called."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_config
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from fastlongspeech import FastLongSpeechConfig, FastLongSpeechForConditionalGeneration

Model = FastLongSpeechForConditionalGeneration
Inputs = dict[str, Tensor]
Make = Callable[..., Any]

NEW = 6


def answer(model: Model, inputs: Inputs, **options: Any) -> list[list[int]]:
    """The new tokens of greedy search; what comes before them has to be the caller's ids."""
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    out = model.generate(**inputs, **options)
    width = inputs["input_ids"].shape[1]
    copies = len(out) // len(inputs["input_ids"])
    assert torch.equal(out[:, :width], inputs["input_ids"].repeat_interleave(copies, dim=0))
    return out[:, width:].tolist()


def by_hand(model: Model, inputs: Inputs, steps: int = NEW) -> list[list[int]]:
    """Greedy search that runs the whole sequence through `forward` for every token."""
    inputs = dict(inputs)
    start = inputs["input_ids"].shape[1]
    for _ in range(steps):
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            best = model(**inputs, position_ids=positions).logits[:, -1:].argmax(-1)
        inputs["input_ids"] = torch.cat((inputs["input_ids"], best), dim=1)
        inputs["attention_mask"] = torch.cat((mask, torch.ones_like(best)), dim=1)
    return inputs["input_ids"][:, start:].tolist()


def test_is_greedy_search_over_forward(model: Model, make_audio: Make, make_prompts: Make) -> None:
    inputs = make_audio([120], [400, 61], [300]) | make_prompts([30], [40], [20])
    assert answer(model, inputs) == by_hand(model, inputs)


@pytest.mark.parametrize("mels", [[2900], [3000], [3000, 100], [3000, 3000, 100]], ids=["29s", "30s", "31s", "61s"])
@pytest.mark.parametrize("target_length", [1, 37, 10_000])
def test_a_length_in_generate_equals_the_length_prepared(
    model: Model, make_audio: Make, make_prompts: Make, mels: list[int], target_length: int
) -> None:
    audio = make_audio(mels)
    kept = min(target_length, sum(m // 4 for m in mels))
    prepared = answer(model, audio | make_prompts([kept]))
    for placeholders in (1, 50, 750):
        assert answer(model, audio | make_prompts([placeholders]), target_length=target_length) == prepared


def test_compression_none_keeps_every_frame(model: Model, make_audio: Make, make_prompts: Make) -> None:
    audio = make_audio([3000, 100])
    everything = answer(model, audio | make_prompts([775]))
    assert answer(model, audio | make_prompts([9]), compression="none") == everything
    model.config.compression = "none"
    assert answer(model, audio | make_prompts([9])) == everything


def test_a_batch_answers_as_one_by_one(model: Model, make_audio: Make, make_prompts: Make) -> None:
    recordings, lengths = [[130], [3000, 500], [700], [9]], [[32], [60], [10], [2]]
    together = make_audio(*recordings) | make_prompts(*lengths)
    batch = answer(model, together)
    resized = answer(model, together, target_length=21)
    first = 0
    for row, recording in enumerate(recordings):
        windows = slice(first, first + len(recording))
        first += len(recording)
        alone = {name: together[name][windows] for name in ("input_features", "feature_attention_mask")}
        alone["windows_per_audio"] = together["windows_per_audio"][row : row + 1]
        mask = together["attention_mask"][row].bool()
        alone["input_ids"] = together["input_ids"][row : row + 1, mask]
        assert answer(model, alone) == [batch[row]]
        assert answer(model, alone, target_length=21) == [resized[row]]


def test_each_recording_of_a_prompt_may_have_its_own_length(
    model: Model, make_audio: Make, make_prompts: Make
) -> None:
    audio = make_audio([400], [3], [3000, 200])
    prepared = answer(model, audio | make_prompts([30, 1], [44]))
    assert answer(model, audio | make_prompts([100, 1], [7]), target_length=[30, 5, 44]) == prepared


def test_several_turns(model: Model, make_audio: Make, make_prompts: Make) -> None:
    """A second question after a first answer, once from the start and once from the first turn's cache."""
    audio = make_audio([900])
    first = make_prompts([50])
    out = model.generate(
        **audio, **first, target_length=20, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    ids = torch.cat((out.sequences, torch.tensor([[12, 13, 14]])), dim=1)
    from_start = answer(model, audio | {"input_ids": ids}, target_length=20)
    from_cache = answer(model, audio | {"input_ids": ids}, target_length=20, past_key_values=out.past_key_values)
    assert from_cache == from_start
    second = make_audio([900], [80], seed=0)
    both = torch.cat((ids, make_prompts([20])["input_ids"]), dim=1)
    assert answer(model, second | {"input_ids": both}, target_length=15)


def test_with_ntk_rope_a_recording_keeps_every_frame_that_the_context_holds(
    make_audio: Make, make_prompts: Make
) -> None:
    fields = tiny_config(ctc_vocab_size=12)
    fields["text_config"] |= {"max_position_embeddings": 1024}
    torch.manual_seed(0)
    model = Model(FastLongSpeechConfig(**fields).with_ntk_rope()).eval()
    model.generation_config.eos_token_id = None
    text = make_prompts([1])["input_ids"].shape[1] - 1
    fits = model.config.fit_length(text + NEW)
    assert fits == 1024 - text - NEW
    for mels, frames in (([3000, 400], 850), ([3000, 3000, 900], fits)):
        inputs = make_audio(mels) | make_prompts([1])
        out = model.generate(
            **inputs, target_length=fits, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True
        )
        assert out.past_key_values.get_seq_length() == text + frames + NEW - 1 < 1024
        if frames < fits:
            assert out.sequences[:, -NEW:].tolist() == answer(model, inputs, compression="none")


def test_text_only(model: Model, make_prompts: Make) -> None:
    inputs = make_prompts([], [])
    assert answer(model, inputs) == by_hand(model, inputs)
    assert answer(model, inputs, target_length=5) == by_hand(model, inputs)


@pytest.mark.parametrize("target_length", [None, 13])
def test_beams_and_several_sequences(
    model: Model, make_audio: Make, make_prompts: Make, target_length: int | None
) -> None:
    audio = make_audio([130], [3000, 100], [60])
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "target_length": target_length}
    beams = answer(model, audio | make_prompts([20, 30], [15]), **options)
    assert len(beams) == 4
    prepared = make_prompts([13, 13], [13]) if target_length else make_prompts([20, 30], [15])
    by_inputs = answer(model, audio | prepared, **(options | {"target_length": None}))
    assert beams == by_inputs
    one = answer(model, audio | prepared, num_beams=3)
    assert one == [beams[0], beams[2]]


def test_sampling_follows_the_seed(model: Model, make_audio: Make, make_prompts: Make) -> None:
    inputs = make_audio([400]) | make_prompts([50])
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "target_length": 10}
    torch.manual_seed(1)
    first = answer(model, inputs, **options)
    torch.manual_seed(1)
    assert answer(model, inputs, **options) == first
    assert len({tuple(row) for row in first}) == 3
    assert answer(model, inputs, **(options | {"top_k": 1})) == 3 * answer(model, inputs, target_length=10)


def test_streamer_gets_the_prompt_and_then_every_token(model: Model, make_audio: Make, make_prompts: Make) -> None:
    class Collect(BaseStreamer):
        pieces: list[Tensor] = []
        ended = False

        def put(self, value: Tensor) -> None:
            self.pieces.append(value)

        def end(self) -> None:
            self.ended = True

    inputs, streamer = make_audio([400]) | make_prompts([50]), Collect()
    new = answer(model, inputs, target_length=10, streamer=streamer)
    assert torch.equal(streamer.pieces[0], inputs["input_ids"])
    assert [int(piece) for piece in streamer.pieces[1:]] == new[0]
    assert streamer.ended


def test_return_dict_in_generate(model: Model, make_audio: Make, make_prompts: Make) -> None:
    inputs = make_audio([400]) | make_prompts([50])
    options: dict[str, Any] = {"target_length": 10, "max_new_tokens": NEW, "do_sample": False}
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(out.sequences, model.generate(**inputs, **options))
    assert len(out.scores) == NEW
    assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] - 50 + 10 + NEW - 1


@pytest.mark.parametrize("target_length", [None, 2, 90])
def test_max_length_and_min_length_count_the_callers_ids(
    model: Model, make_audio: Make, make_prompts: Make, target_length: int | None
) -> None:
    inputs = make_audio([400]) | make_prompts([50])
    width = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, target_length=target_length, max_length=width + 4, do_sample=False)
    assert out.shape[1] == width + 4
    model.generation_config.eos_token_id = out[0, width].item()
    assert len(answer(model, inputs, target_length=target_length)[0]) == 1
    assert len(answer(model, inputs, target_length=target_length, min_length=width + 3)[0]) > 3
    with pytest.raises(ValueError, match="max_length"):
        model.generate(**inputs, target_length=target_length, max_length=width)


def test_static_cache(model: Model, make_audio: Make, make_prompts: Make) -> None:
    inputs = make_audio([400]) | make_prompts([5])
    static = answer(model, inputs, target_length=90, cache_implementation="static", disable_compile=True)
    assert static == answer(model, inputs, target_length=90)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dtypes_and_attention_implementations(
    make_model: Make, make_audio: Make, make_prompts: Make, dtype: torch.dtype, attention: str
) -> None:
    inputs = make_audio([300], [200, 100]) | make_prompts([30], [30])
    model = make_model()
    exact = model.get_audio_features(**make_audio([500]), target_length=125).pooler_output
    model.to(dtype).set_attn_implementation(attention)
    assert all(len(row) == NEW for row in answer(model, inputs, target_length=20))
    audio = model.get_audio_features(**make_audio([500]), target_length=125)
    assert audio.pooler_output.dtype == dtype
    assert audio.spans.dtype == torch.float32
    tolerance = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(audio.pooler_output.float(), exact, rtol=tolerance, atol=tolerance)


def test_ids_may_come_as_inputs_and_without_a_mask(model: Model, make_audio: Make, make_prompts: Make) -> None:
    audio, prompts = make_audio([400]), make_prompts([50])
    out = model.generate(prompts["input_ids"], **audio, target_length=10, max_new_tokens=NEW, do_sample=False)
    assert out[:, -NEW:].tolist() == answer(model, audio | prompts, target_length=10)


def test_refuses_prompts_that_do_not_fit_the_recordings(model: Model, make_audio: Make, make_prompts: Make) -> None:
    audio = make_audio([400], [3000, 100])
    with pytest.raises(ValueError, match="1 runs of audio placeholders for 2 recordings"):
        answer(model, audio | make_prompts([50]))
    with pytest.raises(ValueError, match="Recording 0 has 101 audio placeholders for 100 frames"):
        answer(model, audio | make_prompts([101], [50]))
    with pytest.raises(ValueError, match="target_length must be a positive integer, got 0"):
        answer(model, audio | make_prompts([50], [50]), target_length=0)
    with pytest.raises(ValueError, match="compression must be one of iterative_fusion, .*, none; got 'zip'"):
        answer(model, audio | make_prompts([50], [50]), compression="zip")


def test_refuses_a_chunked_prefill(model: Model, make_audio: Make, make_prompts: Make) -> None:
    with pytest.raises(ValueError, match="prefill_chunk_size cannot split prompts that hold recordings"):
        answer(model, make_audio([400]) | make_prompts([50]), prefill_chunk_size=8)
