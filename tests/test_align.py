"""Stage 0: the projector begins from what the CTC decoder hears, and learns to be read with the language model."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLIP_SECONDS, CLIP_TEXTS, write_rows
from safetensors.torch import load_file

from fastlongspeech import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from fastlongspeech.data.manifests import load_rows
from fastlongspeech.train import align
from fastlongspeech.train.cache import FeatureCache, describe_encoder

TEXTS = [
    {"passage": "The cat sat.", "question": "Who sat?", "answer": "the cat"},
    {"audio": "elsewhere.wav", "question": "of another task"},
    {"question": "Who ran?", "answer": "a dog"},
]


def arguments(model: Path, data: Path, output: Path, *more: object) -> list[str]:
    """Four steps of four rows at a learning rate that shows."""
    write_rows(data / "texts.jsonl", TEXTS)
    settings = ["--model", model, "--train_data", data / "asr.jsonl", "--output_dir", output, "--max_steps", 4]
    settings += ["--text_data", data / "texts.jsonl", "--text_share", 0.5, "--lora_r", 4, "--lora_alpha", 4]
    settings += ["--per_device_train_batch_size", 4, "--learning_rate", 0.02, "--lr_scheduler_type", "constant"]
    settings += ["--optim", "sgd", "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no", *more]
    return [str(setting) for setting in settings]


def trained(model: Path, data: Path, output: Path, *more: object) -> dict[str, torch.Tensor]:
    """The weights a run ends with."""
    align.main(arguments(model, data, output, *more))
    return load_file(output / "model.safetensors")


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_projector_and_adapters_train_and_the_folder_is_complete(checkpoint, data, tmp_path, capsys):
    evaluation = ["--eval_data", data / "asr.jsonl", "--eval_strategy", "steps", "--eval_steps", 4]
    after = trained(checkpoint, data, tmp_path / "out", *evaluation)
    before = load_file(checkpoint / "model.safetensors")
    parts = {name.split(".")[1] for name in changed(before, after)}
    assert parts == {"multi_modal_projector", "language_model"}
    matrices = {name for name, weight in before.items() if "language_model.layers" in name and weight.ndim == 2}
    assert {name for name in changed(before, after) if "language_model" in name} == matrices

    model = FastLongSpeechForConditionalGeneration.from_pretrained(tmp_path / "out")
    inputs = FastLongSpeechProcessor.from_pretrained(tmp_path / "out")(
        text="<|audio_bos|><|AUDIO|><|audio_eos|>", audio=str(data / "clips" / "1.wav")
    )
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert "eval_loss" in set().union(*log)
    assert "# regression: the nearest embedding" in capsys.readouterr().out


def test_without_lora_all_of_the_language_model_trains(checkpoint, data, tmp_path):
    after = trained(checkpoint, data, tmp_path / "out", "--lora_r", 0, "--regression_rows", 0)
    left = set(after) - changed(load_file(checkpoint / "model.safetensors"), after)
    assert {name.split(".")[1] for name in left if "bias" not in name} == {"audio_tower", "ctc_decoder"}


def test_a_run_that_was_killed_goes_on_to_the_same_weights(checkpoint, data, tmp_path):
    saving = ["--save_strategy", "steps", "--save_steps", 2]
    whole = trained(checkpoint, data, tmp_path / "whole", *saving)
    (tmp_path / "again").mkdir()
    for name in ("settings.yaml", "checkpoint-2"):
        copy = shutil.copytree if name != "settings.yaml" else shutil.copy
        copy(tmp_path / "whole" / name, tmp_path / "again" / name)
    again = trained(checkpoint, data, tmp_path / "again", *saving)
    for name, weight in whole.items():
        torch.testing.assert_close(again[name], weight)


@pytest.mark.parametrize("cached", [False, True], ids=["encoded", "cached"])
def test_the_regression_is_that_of_a_plain_loop(checkpoint, data, tmp_path, cached):
    model = FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint)
    processor = FastLongSpeechProcessor.from_pretrained(checkpoint)
    processor.ctc_tokenizer = None  # the decoder says tokens of the language model
    torch.manual_seed(0)
    model.model.reset_ctc_decoder(0)
    model.config.ctc_trained = True
    model.model.ctc_decoder.linear.weight.data.normal_(std=3)
    model.model.ctc_decoder.linear.weight.data[-1] = 0.1  # not always the blank
    rows = load_rows(data / "asr.jsonl", ("audio", "text"))
    options: list[Any] = []
    if cached:
        encoder = describe_encoder(model.model.requires_grad_(False), processor, "x")
        options = [FeatureCache(tmp_path, encoder, 16, 1e9)]
    align.regress_projector(model, processor, rows, 100, *options)

    inputs, targets, weights = [], [], []
    for number in range(len(CLIP_SECONDS)):
        recordings = model.encode(**processor(audio=str(data / "clips" / f"{number}.wav")))
        frames = recordings.frames.bfloat16().float() if cached else recordings.frames
        frames = model.model.audio_tower.layer_norm(frames).detach()
        said = model.model.ctc_decoder(frames).argmax(-1).tolist()
        first = 0
        for at in range(1, len(said) + 1):
            if at == len(said) or said[at] != said[first]:
                is_text = said[first] != model.config.ctc_blank
                inputs.append([*frames[first:at].mean(0).tolist(), 1.0])
                embedding = model.get_input_embeddings().weight.detach()
                targets.append(embedding[said[first]].tolist() if is_text else [0.0] * 16)
                weights.append(1.0 if is_text else align.BLANK_WEIGHT)
                first = at
    x, y, w = np.array(inputs), np.array(targets), np.array(weights)[:, None]
    square = x.T @ (x * w)
    expected = np.linalg.solve(square + align.RIDGE * np.diag(square).mean() * np.eye(len(square)), x.T @ (y * w))
    linear = model.model.multi_modal_projector.linear
    found = torch.cat([linear.weight.T, linear.bias[None]]).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_pieces_become_tokens_with_the_frames_of_their_letters(processor):
    pieces = processor.ctc_tokenizer.encode("the cat")
    blank = processor.ctc_vocab_size
    heard, frames_of_piece = [], []
    for piece in pieces:  # every piece takes two frames, and a blank follows
        frames_of_piece.append([len(heard), len(heard) + 1])
        heard += [piece, piece, blank]
    found = list(align.heard_tokens(torch.tensor(heard), blank, processor))
    spoken = [(processor.tokenizer.decode([token]), frames) for token, frames in found if token is not None]
    letters = [
        (letter, frames)
        for piece, frames in zip(pieces, frames_of_piece, strict=True)
        for letter in processor.ctc_tokenizer.id_to_piece(piece).replace("\u2581", "")
    ]
    assert spoken == letters  # the tests' tokenizer has a token for every letter
    assert [frames for token, frames in found if token is None] == [[frames[1] + 1] for frames in frames_of_piece]


def test_short_clips_come_first_in_the_first_epoch_and_only_there():
    durations = np.random.default_rng(0).uniform(1, 30, 400).tolist()
    sampler = align.ShortFirstSampler(durations, 4, 0, lambda: 0, max_steps=1000)
    longest = [max(durations[row] for row in step) for step in sampler.steps_of(0)]
    assert longest == sorted(longest)
    assert sorted(row for step in sampler.steps_of(0) for row in step) == list(range(400))
    longest = [max(durations[row] for row in step) for step in sampler.steps_of(1)]
    assert longest != sorted(longest)
    few = align.ShortFirstSampler(durations, 4, 0, lambda: 0, max_steps=10)
    longest = [max(durations[row] for row in step) for step in few.steps_of(0)[:10]]
    assert longest == sorted(longest) and longest[-1] > 15  # a short run hears long ones too


def test_rows_of_text_are_mixed_in_and_do_not_depend_on_how_a_step_is_divided(processor, data):
    texts = align.load_texts(str(write_rows(data / "texts.jsonl", TEXTS)))
    assert [row["answer"] for row in texts] == ["the cat", "a dog"]
    rows = [{"audio": str(data / "clips" / f"{n}.wav"), "text": CLIP_TEXTS[n], "step": 7} for n in (1, 2, 3, 4)]

    def prompts(*batches: list[dict]) -> list[str]:
        collate = align.AlignCollator(processor, texts, 1.0, seed=0)
        found = []
        for batch in batches:
            made = collate(batch)
            assert len(made["labels"]) == 2 * len(batch) and len(made["windows_per_audio"]) == len(batch)
            for ids in made["input_ids"]:
                found.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
        return sorted(found)

    together = prompts(rows)
    assert together == prompts(rows[:2], rows[2:])
    assert sum("Who" in prompt for prompt in together) == 4
    whole = processor.tokenizer.decode(align.AlignCollator(processor, [], 0.2, seed=0)(rows[:1])["input_ids"][0])
    assert whole.endswith(f"assistant\n{CLIP_TEXTS[1]}<|im_end|>")
    assert whole.count("<|AUDIO|>") == 25  # a second, every frame


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--text_data", "nowhere.jsonl"], "no text_data at 'nowhere.jsonl'; check the path"),
        (["--text_share", -1], "text_share must lie between 0 and 10, got -1.0; correct it"),
        (["--lora_r", -2], "lora_r must be 0 or more, got -2; correct it"),
    ],
)
def test_settings_are_refused_in_one_sentence(settings, message, checkpoint, data, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        align.main(arguments(checkpoint, data, tmp_path / "out", *settings))


def test_rows_of_text_without_an_answer_are_named(tmp_path):
    path = write_rows(tmp_path / "texts.jsonl", [TEXTS[0], {"question": "Who?"}, "no JSON"])
    with pytest.raises(ValueError, match=r"2 bad rows.*\n.*line 2 lacks.*\n.*line 3 is not JSON"):
        align.load_texts(str(path))


def test_a_model_without_a_ctc_decoder_is_told_what_to_train_first(checkpoint, data, tmp_path):
    model = FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint)
    state = {name: weight for name, weight in model.state_dict().items() if ".ctc_decoder." not in name}
    model.save_pretrained(tmp_path / "assembled", state_dict=state)
    FastLongSpeechProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "assembled")
    with pytest.raises(ValueError, match="no trained CTC decoder.*run train.ctc first"):
        align.main(arguments(tmp_path / "assembled", data, tmp_path / "out"))
