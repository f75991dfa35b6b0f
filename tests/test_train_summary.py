"""The stage that teaches a model to sum recordings up: what trains, what is drawn, and that runs can be resumed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import write_rows
from peft import PeftModel
from safetensors.torch import load_file
from test_train import arguments, changed
from transformers import AutoModelForMultimodalLM

from fastlongspeech import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from fastlongspeech.train import summary
from fastlongspeech.train.stage import StageTrainer, parse_settings

OWN = ("--interval", 16, "--curriculum", "2", "2,4", "--curriculum_steps", 2)


def trained(model: Path, data: Path, output: Path, *more: object, own: tuple = OWN) -> dict[str, torch.Tensor]:
    """The weights that four steps end with."""
    summary.main(arguments(summary, model, data, output, *own, *more, own=["--lora_r", 4, "--lora_dropout", 0]))
    return load_file(output / "model.safetensors")


def is_new(name: str) -> bool:
    return "summary_" in name


def test_what_trains_is_saved_as_one_folder_that_answers(checkpoint, data, tmp_path):
    evaluation = ["--eval_data", data / "qa.jsonl", "--eval_strategy", "steps", "--eval_steps", 4]
    evaluation += ["--eval_ratios", 2, 16, "--save_strategy", "steps", "--save_steps", 4, "--gradient_checkpointing"]
    after = trained(checkpoint, data, tmp_path / "out", *evaluation)
    before = load_file(checkpoint / "model.safetensors")
    adapted = {n for n in before if re.fullmatch(r"model\.language_model\.layers\..*[qkvo]_proj\.weight", n)}
    assert changed(before, after) == adapted and len(adapted) == 4
    new = {name for name in after if name not in before}
    assert new and all(map(is_new, new))
    kinds = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")
    layer = "model.language_model.layers.0.self_attn.summary_"
    assert new == {"model.summary_embedding.weight", *(layer + kind for kind in kinds)}
    for kind in ("k_proj.weight", "v_proj.weight"):  # in the only layer, what summaries ask is never used
        assert not torch.equal(after[layer + kind], before[layer.replace("summary_", "") + kind])

    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert (model.config.compression, model.config.summary_interval) == ("summary", 16)
    processor = FastLongSpeechProcessor.from_pretrained(tmp_path / "out")
    prompt = "<|audio_bos|><|AUDIO|><|audio_eos|>\nWho?"
    inputs = processor(text=prompt, audio=str(data / "clips" / "1.wav"), compression="summary")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert {"eval_ratio2_loss", "eval_ratio16_loss"} <= set().union(*log)

    # The adapter's folder alone holds all that was learnt.
    base = FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint, summary_interval=16)
    merged = PeftModel.from_pretrained(base, tmp_path / "out" / "checkpoint-4").merge_and_unload().state_dict()
    assert all(torch.equal(merged[name], after[name]) for name in after)


def test_a_killed_run_goes_on_as_if_it_had_not_been(checkpoint, data, tmp_path, monkeypatch):
    more = ["--save_strategy", "steps", "--save_steps", 1, "--optim", "adamw_torch", "--lora_dropout", 0.3]
    whole = trained(checkpoint, data, tmp_path / "whole", *more)
    training_step = StageTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageTrainer, "training_step", killed)
        trained(checkpoint, data, tmp_path / "killed", *more)
    assert not changed(whole, trained(checkpoint, data, tmp_path / "killed", *more))


def test_frozen_weights_may_be_bfloat16_while_what_trains_is_float32(checkpoint, data, tmp_path, monkeypatch):
    seen: set[tuple[bool, torch.dtype]] = set()
    training_step = StageTrainer.training_step

    def spy(self, model, *args, **kwargs):
        seen.update((weight.requires_grad, weight.dtype) for weight in model.parameters())
        return training_step(self, model, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", spy)
    after = trained(checkpoint, data, tmp_path / "out", "--dtype", "bfloat16", "--bf16", "--max_steps", 1)
    assert seen == {(False, torch.bfloat16), (True, torch.float32)}
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    assert all(weight.isfinite().all() for weight in after.values())


@pytest.mark.parametrize("phase", ["asr", pytest.param("questions", marks=pytest.mark.slow)])
def test_the_first_phases_train_projector_and_adapters_with_every_frame(checkpoint, data, tmp_path, phase):
    manifest = data / ("asr.jsonl" if phase == "asr" else "qa.jsonl")
    after = trained(checkpoint, data, tmp_path / "out", "--phase", phase, "--train_data", manifest, "--max_steps", 2)
    before = load_file(checkpoint / "model.safetensors")
    assert after.keys() == before.keys()
    assert all("_proj.weight" in name or "multi_modal_projector" in name for name in changed(before, after))
    assert any("multi_modal_projector" in name for name in changed(before, after))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["compression"] == "iterative_fusion"


@pytest.mark.slow
def test_a_phase_starts_from_what_the_last_one_learnt(checkpoint, data, tmp_path):
    first = trained(checkpoint, data, tmp_path / "first", "--max_steps", 1)
    again = trained(tmp_path / "first", data, tmp_path / "again", "--max_steps", 1, "--learning_rate", 0)
    assert not changed(first, again)


# What is drawn


@pytest.fixture
def collator(checkpoint):
    processor = FastLongSpeechProcessor.from_pretrained(checkpoint)
    return summary.SummaryCollator(processor, [[2], [2, 4], [2, 4, 8]], 10, 16, [750, 375], seed=3)


def rows(data: Path, **more: object) -> list[dict]:
    clips = (("0.wav", "Who?"), ("1.wav", "What?"))
    return [{"audio": str(data / "clips" / clip), "question": asked, "answer": "cat"} | more for clip, asked in clips]


def test_every_interval_draws_its_ratio_from_the_step_s_set(collator, data):
    for step, allowed in ((0, {2}), (9, {2}), (10, {2, 4}), (19, {2, 4}), (20, {2, 4, 8}), (999, {2, 4, 8})):
        assert set(collator.draw(step, 200)) == allowed
    drawn = np.array([collator.draw(step, 40) for step in range(20, 220)])
    shares = [(drawn == ratio).mean() for ratio in (2, 4, 8)]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.02)
    assert collator.draw(25, 9) == collator.draw(25, 40)[:9]
    batch = collator(rows(data, step=25))
    frames = (batch["input_ids"] == collator.processor.audio_token_id).sum(1)
    assert batch["compression_ratio"].tolist() == collator.draw(25, -(-int(frames.max()) // 16))


def test_a_step_draws_the_length_of_30_seconds(collator, data):
    found = set()
    for step in range(8):
        batch = collator(rows(data, step=step))
        found.add(tuple((batch["input_ids"] == collator.processor.audio_token_id).sum(1).tolist()))
    assert found == {(775, 25), (388, 13)}  # 31 s and 1 s


def test_evaluation_has_one_ratio_and_every_frame(collator, data):
    batch = collator(rows(data, compression_ratio=8, target_length=750))
    assert set(batch["compression_ratio"].tolist()) == {8}
    assert (batch["input_ids"] == collator.processor.audio_token_id).sum(1).tolist() == [775, 25]


# Settings


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--phase", "captions"], "phase must be one of asr, questions, summary, got 'captions'"),
        (
            ["--interval", 20, "--curriculum", "2,8"],
            "multiple of every ratio of the curriculum, got 20 with 8; take 24",
        ),
        (["--curriculum", "2", "0"], "a ratio must be a positive integer, got 0"),
        (["--curriculum", "2;4"], r"curriculum must be sets of integers such as 2 2,4 2,4,8, got \['2;4'\]"),
        (["--eval_ratios", -1], "a ratio must be a positive integer, got -1; correct curriculum or eval_ratios"),
        (["--curriculum_steps", 0], "curriculum_steps must be a positive integer, got 0"),
        (["--target_lengths", 0], r"target_lengths must be positive integers, got \[0\]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(checkpoint, data, tmp_path, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        trained(checkpoint, data, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_the_recipe_for_the_7b_model_is_complete_but_for_the_data(monkeypatch):
    recipe = Path(summary.__file__).parent / "recipes" / "summary-qwen2-audio-7b.yaml"
    given = yaml.safe_load(recipe.read_text())
    settings, training = parse_settings(
        summary.SummaryArguments, [str(recipe), "--train_data", "a.jsonl", "--use_cpu"]
    )
    assert {**vars(settings), **training.to_dict()}.items() >= {k: v for k, v in given.items() if v != []}.items()
    assert summary.read_curriculum(settings) == [[2], [2, 4], [2, 4, 8]]


def test_a_transcription_needs_its_text(checkpoint, tmp_path, data):
    write_rows(tmp_path / "qa.jsonl", [{"audio": str(data / "clips" / "1.wav"), "question": "Who?", "answer": "cat"}])
    with pytest.raises(ValueError, match="line 1 has no 'text'"):
        trained(checkpoint, tmp_path, tmp_path / "out", "--phase", "asr")
