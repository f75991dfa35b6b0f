"""Answers from recordings that the language model has summed up: generated, kept, saved, asked again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AUDIO_TOKEN, speech
from safetensors.torch import load_file, save_file
from test_generation import answer
from test_generation_strategies import NEW, ROWS, STRATEGIES, encoded, one_by_one, without_padding
from test_remote_code import run_without_the_package
from test_summary import with_summaries
from transformers import DynamicCache

from fastlongspeech import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor, SummarisedRecordings

Model = FastLongSpeechForConditionalGeneration
Inputs = dict[str, Any]
Make = Callable[..., Any]

RATIO = 4
SUMMARY: dict[str, Any] = {"compression": "summary", "compression_ratio": RATIO}
OTHER_CACHES = ("no cache", "static cache", "static cache, beams")
OTHER_COMPRESSIONS = ("every frame", "another compression")
QUICK = ("greedy", "fixed length", "beams, all returned", "sampling when cold", "ends", "guidance")
OFFERED = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in STRATEGIES
    if name not in OTHER_CACHES + OTHER_COMPRESSIONS
]


@pytest.fixture
def model() -> Model:
    return with_summaries(48, seed=2, initializer_range=0.6, num_attention_heads=4)


@pytest.fixture
def batch(make_audio: Make, make_prompts: Make) -> Inputs:
    """Two recordings, one of two windows, text alone, one of a few frames; a placeholder for every frame."""
    recordings = [windows for of_row, _ in ROWS for windows in of_row]
    frames = [[sum(mel // 4 for mel in windows) for windows in of_row] for of_row, _ in ROWS]
    return make_audio(*recordings) | make_prompts(*frames)


# Oracle 7: answers from the cache are greedy answers of the whole prompt, read again for every token


def test_greedy_answers_are_those_of_one_pass_again_and_again(model: Model, batch: Inputs) -> None:
    found = answer(model, batch, **SUMMARY, suppress_tokens=[AUDIO_TOKEN])  # another would be a recording
    for row, alone in zip(found, one_by_one(batch), strict=True):
        ids, said = alone["input_ids"], []
        heard = SUMMARY if "input_features" in alone else {}
        for _ in range(NEW):
            alone = alone | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                logits = model(**alone, **heard).logits[0, -1]
                said.append(int(logits.index_fill(0, torch.tensor([AUDIO_TOKEN]), -torch.inf).argmax()))
            ids = torch.cat((ids, torch.tensor([[said[-1]]])), dim=1)
        assert row == said


# Oracle 4: a batch answers as its rows alone, in every way to generate


@pytest.mark.parametrize("strategy", OFFERED)
def test_a_batch_answers_as_its_rows_alone(model: Model, batch: Inputs, strategy: str) -> None:
    options = STRATEGIES[strategy] | SUMMARY
    together = answer(model, batch, **options)
    heard = [options if "input_features" in row else STRATEGIES[strategy] for row in one_by_one(batch)]
    alone = [
        said
        for row, wanted in zip(one_by_one(batch), heard, strict=True)
        for said in answer(
            model, row, **{k: v for k, v in wanted.items() if k != "target_length" or "compression" in wanted}
        )
    ]
    fill = options.get("eos_token_id", 0)
    fill = fill if isinstance(fill, int) else fill[0]
    assert without_padding(alone, fill) == without_padding(together, fill)
    assert answer(model, encoded(model, batch), **options) == together


def test_prompt_lookup_equals_greedy_search_and_saves_steps(model: Model, batch: Inputs) -> None:
    repeats = with_summaries(48)  # says tokens again, which are looked up
    read: list[int] = []
    repeats.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    options, steps = {"max_new_tokens": 12, "prompt_lookup_num_tokens": 3}, 0
    for one in (model, repeats):
        for row in (row for row in one_by_one(batch) if "input_features" in row):
            greedy = answer(one, row, **SUMMARY, max_new_tokens=12)
            assert answer(one, row, **SUMMARY, **options) == greedy
            kept = one.summarise(**row, compression_ratio=RATIO)
            prompt = {name: row[name] for name in ("input_ids", "attention_mask")}
            read.clear()
            assert answer(one, prompt | {"recordings": kept}, **options) == greedy
            assert max(read, default=0) <= 4  # what follows the recordings, or a draft and the token before it
            steps += len(read)
    assert 0 < steps < 3 * 13


def test_beams_and_answers_of_recordings_of_very_different_durations(
    model: Model, make_audio: Make, make_prompts: Make
) -> None:
    """Two minutes, one frame, and 37 s in one batch."""
    durations, frames = ([3000] * 4, [4], [3000, 700]), (3000, 1, 925)
    together = make_audio(*durations) | make_prompts(*([n] for n in frames))
    alone, window = [], 0
    for row, windows in enumerate(durations):
        real = together["attention_mask"][row].bool()
        inputs = {name: together[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
        for name in ("input_features", "feature_attention_mask"):
            inputs[name] = together[name][window : window + len(windows)]
        window += len(windows)
        inputs["windows_per_audio"] = torch.tensor([len(windows)])
        alone += answer(model, inputs, **SUMMARY, num_beams=3, num_return_sequences=2)
    assert answer(model, together, **SUMMARY, num_beams=3, num_return_sequences=2) == alone


def test_summaries_give_other_answers_than_every_frame(model: Model, batch: Inputs) -> None:
    assert answer(model, batch, **SUMMARY) != answer(model, batch, compression="none")
    assert answer(model, batch, **SUMMARY) != answer(model, batch, **SUMMARY, target_length=75)


def test_the_configured_compression_and_ratio_are_taken(model: Model, batch: Inputs) -> None:
    expected = answer(model, batch, **SUMMARY)
    model.config.compression, model.config.compression_ratio = "summary", RATIO
    assert answer(model, batch) == expected


def test_answers_follow_the_callers_own_prompt(model: Model, batch: Inputs) -> None:
    out = model.generate(**batch, **SUMMARY, max_new_tokens=3, num_beams=2, num_return_sequences=2, do_sample=False)
    width = batch["input_ids"].shape[1]
    assert out.shape == (2 * len(ROWS), width + 3)
    assert torch.equal(out[:, :width], batch["input_ids"].repeat_interleave(2, dim=0))
    assert torch.equal(model.generate(**batch, **SUMMARY, max_length=width + 3, do_sample=False), out_of(model, batch))


def out_of(model: Model, batch: Inputs) -> torch.Tensor:
    whole = model.generate(**batch, **SUMMARY, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    return whole.sequences


# Kept, and asked again


def test_a_second_question_reads_its_own_tokens_alone(model: Model, make_audio: Make, make_prompts: Make) -> None:
    audio, prompts = make_audio([3000, 400]), make_prompts([850], [850])
    first = {name: value[:1] for name, value in prompts.items()}
    second = {"input_ids": prompts["input_ids"][:1].clone(), "attention_mask": first["attention_mask"]}
    second["input_ids"][0, -2:] = torch.tensor([33, 44])
    kept = model.summarise(**first, **audio, compression_ratio=RATIO)
    assert len(kept) == 1 and kept.lengths.tolist() == [-(-850 // 48) * 12 - (12 - -(-(850 % 48) // 4))]
    read: list[int] = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    found = answer(model, second | {"recordings": kept})
    assert read == [2, *[1] * NEW]  # what follows the recording, but for its last token; then one at a time
    assert found == answer(model, second | audio, **SUMMARY)
    assert answer(model, first | {"recordings": kept}) == answer(model, first | audio, **SUMMARY)


def test_summaries_are_asked_as_often_as_one_likes(model: Model, batch: Inputs) -> None:
    kept = model.summarise(**batch, compression_ratio=RATIO)
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = answer(model, batch, **SUMMARY)
    for _ in range(2):
        assert answer(model, prompts | {"recordings": kept}) == expected
    beams = answer(model, prompts | {"recordings": kept}, num_beams=3, num_return_sequences=2)
    assert beams == answer(model, batch, **SUMMARY, num_beams=3, num_return_sequences=2)


def test_a_conversation_of_several_recordings_and_turns_goes_on(
    model: Model, make_audio: Make, make_prompts: Make
) -> None:
    audio, prompt = make_audio([400], [130]), make_prompts([100, 32])
    kept = model.summarise(**prompt, **audio, compression_ratio=RATIO)
    first = model.generate(**prompt, recordings=kept, max_new_tokens=4, do_sample=False)
    more = torch.cat((first, torch.tensor([[8, 9, 7]])), dim=1)
    expected = answer(model, {"input_ids": more} | audio, **SUMMARY)
    assert answer(model, {"input_ids": more, "recordings": kept}) == expected


def test_one_opening_for_several_questions(model: Model, make_audio: Make, make_prompts: Make) -> None:
    audio, prompt = make_audio([400], [130]), make_prompts([100, 32])
    ids = torch.stack([torch.cat((prompt["input_ids"][0], torch.tensor(end))) for end in ([8, 9], [3, 4], [8, 1])])
    kept = model.summarise(**prompt, **audio, compression_ratio=RATIO)
    alone = [answer(model, {"input_ids": row[None]} | audio, **SUMMARY)[0] for row in ids]
    assert answer(model, {"input_ids": ids, "recordings": kept}) == alone


def test_one_encoded_recording_for_several_questions_is_read_once(
    model: Model, make_audio: Make, make_prompts: Make
) -> None:
    recordings, prompts = model.encode(**make_audio([400])), make_prompts([100])
    ids = torch.stack([torch.cat((prompts["input_ids"][0], torch.tensor(end))) for end in ([8, 9], [3, 4])])
    read: list[int] = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    together = answer(model, {"input_ids": ids, "recordings": recordings}, **SUMMARY)
    assert [size for size in read if size > 4] == [60, 60, 5]  # intervals of 48, 48 and 4 frames, with their summaries
    alone = [answer(model, {"input_ids": row[None], "recordings": recordings}, **SUMMARY)[0] for row in ids]
    assert together == alone


def test_summaries_are_saved_and_loaded(model: Model, batch: Inputs, tmp_path: Path) -> None:
    kept = model.summarise(**batch, compression_ratio=RATIO)
    kept.save(tmp_path / "kept.safetensors")
    with pytest.raises(FileNotFoundError, match="is in a folder that does not exist; make .*absent first"):
        kept.save(tmp_path / "absent" / "kept.safetensors")
    again = SummarisedRecordings.load(tmp_path / "kept.safetensors")
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert answer(model, prompts | {"recordings": again}) == answer(model, prompts | {"recordings": kept})
    assert not list(tmp_path.glob("*.unfinished"))


def test_openings_of_several_calls_make_a_batch(model: Model, batch: Inputs) -> None:
    rows = [row for row in one_by_one(batch) if "input_features" in row]
    kept = SummarisedRecordings.cat(model.summarise(**row, compression_ratio=RATIO) for row in rows)
    prompts = {name: batch[name][[0, 1, 3]] for name in ("input_ids", "attention_mask")}
    found = answer(model, prompts | {"recordings": kept})
    assert found == [answer(model, row, **SUMMARY)[0] for row in rows]


def test_the_processor_takes_summaries_for_recordings(checkpoint: Path) -> None:
    processor = FastLongSpeechProcessor.from_pretrained(checkpoint)
    model = Model.from_pretrained(checkpoint, summary_interval=48).eval()

    def chat(question: str, audio: dict[str, Any], **options: Any) -> Any:
        turn = {"role": "user", "content": [{"type": "audio"} | audio, {"type": "text", "text": question}]}
        return processor.apply_chat_template(
            [turn], add_generation_prompt=True, tokenize=True, return_dict=True, **options
        )

    audio = {"audio": speech(5.0)}
    inputs = chat("Who?", audio, sampling_rate=16000, compression="summary")
    assert int((inputs["input_ids"] == processor.audio_token_id).sum()) == 125
    kept = model.summarise(**inputs, compression_ratio=RATIO)
    for question in ("Who?", "Where was that?"):
        asked = chat(question, {}, recordings=kept, compression="none")
        assert int((asked["input_ids"] == processor.audio_token_id).sum()) == int(kept.lengths) == 12 + 12 + 8
        found = answer(model, dict(asked) | {"recordings": kept})
        whole = chat(question, audio, sampling_rate=16000, compression="summary")
        assert found == answer(model, dict(whole), **SUMMARY)


FRESH_PROCESS = """
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForMultimodalLM

    model = AutoModelForMultimodalLM.from_pretrained("model", trust_remote_code=True).eval()
    inputs = load_file("inputs.safetensors")
    options = {"compression": "summary", "compression_ratio": 4, "max_new_tokens": 6, "do_sample": False}
    kept = model.summarise(**inputs, compression_ratio=4)
    kept.save("kept.safetensors")
    save_file({"answers": model.generate(**inputs, **options)}, "out.safetensors")
"""
ANOTHER_DAY = """
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForMultimodalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    model = AutoModelForMultimodalLM.from_pretrained("model", trust_remote_code=True).eval()
    kept = get_class_from_dynamic_module("summarised_fastlongspeech.SummarisedRecordings", "model")
    kept = kept.load("kept.safetensors")
    inputs = load_file("inputs.safetensors")
    prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    answers = model.generate(**prompts, recordings=kept, max_new_tokens=6, do_sample=False)
    save_file({"answers": answers}, "out.safetensors")
"""


@pytest.mark.slow
def test_a_process_without_the_package_sums_up_alike(model: Model, batch: Inputs, tmp_path: Path) -> None:
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path / "model")
    save_file(batch, tmp_path / "inputs.safetensors")
    run_without_the_package(tmp_path, FRESH_PROCESS)
    (found,) = load_file(tmp_path / "out.safetensors").values()
    assert found[:, -NEW:].tolist() == answer(model, batch, **SUMMARY)
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    kept = SummarisedRecordings.load(tmp_path / "kept.safetensors")
    assert answer(model, prompts | {"recordings": kept}) == found[:, -NEW:].tolist()
    run_without_the_package(tmp_path, ANOTHER_DAY)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["answers"], found)


# Refused


def refuse(model: Model, inputs: Inputs, sentence: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=sentence):
        answer(model, inputs, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cache_implementation": "static"}, "cache_implementation='static' has no place for summaries"),
        ({"use_cache": False}, "use_cache=False has no place for summaries"),
        ({"past_key_values": DynamicCache()}, "past_key_values can't be read before recordings that are summed up"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size cannot split prompts that hold recordings"),
        ({"compression_ratio": 0}, "compression_ratio must be a positive integer, got 0"),
        ({"compression_ratio": True}, "compression_ratio must be a positive integer, got True"),
        ({"compression_ratio": 2.0}, r"compression_ratio must be a positive integer, got 2\.0"),
        ({"compression_ratio": [4, 4]}, "compression_ratio must be an integer or one for each of 3 intervals"),
        ({"target_length": 0}, "target_length must be"),
        ({"compression": "none"}, "compression_ratio is for compression=\"summary\", got 4 with 'none'; leave it out"),
    ],
)
def test_bad_options_are_refused(model: Model, batch: Inputs, options: dict[str, Any], sentence: str) -> None:
    refuse(model, batch, sentence, **(SUMMARY | options))


def test_summaries_that_do_not_fit_are_refused(model: Model, batch: Inputs, tmp_path: Path) -> None:
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    kept = model.summarise(**batch, compression_ratio=RATIO)
    inputs = prompts | {"recordings": kept}
    refuse(model, inputs, "summed up already leave no choice of compression_ratio; leave it out", compression_ratio=2)
    refuse(with_summaries(48, seed=3), inputs, "recordings were summed up by another model, whose keys and values")
    unnamed = replace(kept, model=None)
    assert answer(model, prompts | {"recordings": unnamed}) == answer(model, inputs)
    for shape in (replace(unnamed, keys=kept.keys[:1]), replace(unnamed, keys=tuple(k[:1] for k in kept.keys))):
        refuse(model, prompts | {"recordings": shape}, "recordings were summed up by another model, whose keys")

    changed = prompts | {"input_ids": prompts["input_ids"].clone(), "recordings": kept}
    changed["input_ids"][1, -1 - 1 - 1 - 875 - 2] += 1
    refuse(model, changed, "prompt 1 must begin as the one whose recordings were summed up and go on after them")
    fewer = {name: value[:2] for name, value in prompts.items()} | {"recordings": kept}
    refuse(model, fewer, "recordings are the openings of 4 prompts, got 2; give as many, or one")
    one = model.summarise(**one_by_one(batch)[0], compression_ratio=RATIO)
    other = {name: one_by_one(batch)[1][name] for name in prompts} | {"recordings": one}
    refuse(model, other, "The prompts have 1 runs of audio placeholders for 2 summed up recordings")

    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="x.safetensors can't be read as summaries of recordings"):
        SummarisedRecordings.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="summaries were not found: .*y.safetensors is no file"):
        SummarisedRecordings.load(tmp_path / "y.safetensors")
    model.encode(**{name: batch[name] for name in batch if name not in prompts}).save(tmp_path / "z.safetensors")
    with pytest.raises(ValueError, match="z.safetensors holds no summaries of recordings; write them with save"):
        SummarisedRecordings.load(tmp_path / "z.safetensors")
    with pytest.raises(ValueError, match="summaries must be of one model to be joined, got those of 2"):
        SummarisedRecordings.cat([kept, with_summaries(48, seed=3).summarise(**batch)])


def test_without_a_recording_nothing_is_summed_up(model: Model, make_audio: Make, make_prompts: Make) -> None:
    prompt = make_prompts([3])
    with pytest.raises(ValueError, match="there is no recording to sum up; give input_features, or recordings"):
        model.summarise(**prompt)
    with pytest.raises(ValueError, match="input_features hold no recording as long as one frame"):
        model.summarise(**prompt, **make_audio([2]))
    kept = model.summarise(**prompt, **make_audio([3]))  # 30 ms are a frame
    assert kept.lengths.tolist() == [1]
    with pytest.raises(ValueError, match="recordings that are summed up are for generate alone"):
        model(**make_prompts([1]), recordings=kept)


def test_a_prompt_must_go_on_after_its_last_recording(model: Model, batch: Inputs) -> None:
    row = one_by_one(batch)[3]
    row = row | {name: row[name][:, :-3] for name in ("input_ids", "attention_mask")}
    refuse(
        model, row, "prompt 0 must begin as the one whose recordings were summed up and go on after them", **SUMMARY
    )


def test_a_model_without_summary_projections_refuses(make_model: Make, batch: Inputs) -> None:
    refuse(make_model(), batch, 'compression="summary" needs summary projections, which', compression="summary")
