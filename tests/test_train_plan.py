"""`plan-training` counts what a step takes: the same as a step on real tensors, without loading anything."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastlongspeech.app import cli
from fastlongspeech.app.cost import TEXT_TOKENS
from fastlongspeech.app.hosts import find_host
from fastlongspeech.train import ctc, dct
from fastlongspeech.train.plan import NF4_BYTES, LiveMemory, Plan, plan, stage_of
from fastlongspeech.train.stage import parse_settings

ROOT = Path(__file__).parents[1]
ROWS, ANSWER, LENGTH = 6, 30, 50


def parsed(stage: Any, model: Path, *more: object) -> tuple[Any, Any]:
    words = ["--model", model, "--train_data", "-", "--output_dir", "-", "--use_cpu"]
    words += ["--per_device_train_batch_size", ROWS, *more]
    kind = ctc.CTCArguments if stage is ctc else dct.DCTArguments
    return parse_settings(kind, [str(word) for word in words])


def test_live_memory_is_what_tensors_hold_at_once():
    with LiveMemory(torch.nn.Linear(1, 1)) as memory:
        first = torch.zeros(1000)
        second = first + 1
        view = second[:10]
        assert memory.alive == 8000
        del first
        assert memory.alive == 4000
        third = view * 2
        del second, view
        assert memory.alive == third.nbytes
    assert memory.peak == 8000


def test_views_of_weights_hold_nothing():
    linear = torch.nn.Linear(1000, 1000)
    with LiveMemory(linear) as memory:
        view = linear.weight.t()
    assert view.shape == (1000, 1000) and memory.peak == 0


def count_step(model: Any, **inputs: Any) -> tuple[int, int]:
    """Returns the most bytes that a step on real tensors holds at once, and its operations as torch counts them."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    model.train()
    with LiveMemory(model) as memory, FlopCounterMode(display=False) as flops:
        features, mask = torch.randn(ROWS, 80, 3000), torch.ones(ROWS, 3000, dtype=torch.int64)
        model(input_features=features, feature_attention_mask=mask, **inputs).loss.backward()
    return memory.peak, flops.get_total_flops()


def step_of_stage_2(checkpoint: Path, *more: str) -> tuple[Plan, int, int]:
    """Returns what is planned, and what `count_step` finds."""
    settings, training = parsed(dct, checkpoint, "--target_lengths", LENGTH, *more)
    model = dct.make_trainable(dct.load_model(find_host(settings.model), settings), settings)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.full((ROWS, LENGTH + TEXT_TOKENS + ANSWER), 5)
    ids[:, 3 : 3 + LENGTH] = model.config.audio_token_id
    return plan(settings, training, answer_tokens=ANSWER), *count_step(model, input_ids=ids, labels=ids)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--gradient_checkpointing"], ["--tuning", "full"]])
def test_a_step_of_stage_2_holds_what_it_holds_on_real_tensors(more, checkpoint):
    planned, memory, _ = step_of_stage_2(checkpoint, *more)
    assert planned.fixed + ROWS * planned.per_row == pytest.approx(memory, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--gradient_checkpointing"], ["--tuning", "full"]])
def test_a_step_of_stage_2_has_as_many_operations_as_on_real_tensors(more, checkpoint):
    # torch counts every product of this attention on a CPU, and nothing of the other
    planned, _, operations = step_of_stage_2(checkpoint, "--attn_implementation", "eager", *more)
    assert planned.operations == pytest.approx(operations, rel=0.02)


def test_a_step_of_stage_1_takes_what_it_takes_on_real_tensors(checkpoint):
    settings, training = parsed(ctc, checkpoint, "--vocab_size", 900)
    planned = plan(settings, training)

    model = ctc.load_model(find_host(settings.model), settings, 900)
    model.model.ctc_decoder.requires_grad_(True)
    memory, _ = count_step(model, ctc_labels=torch.ones(ROWS, 20, dtype=torch.int64))
    assert planned.fixed + ROWS * planned.per_row == pytest.approx(memory, rel=0.15)


@pytest.mark.slow
def test_weights_of_the_7b_model():
    stage_2 = ROOT / "train" / "recipes" / "dct-qwen2-audio-7b.yaml"
    more = ["--model", "Qwen/Qwen2-Audio-7B-Instruct", "--train_data", "-", "--use_cpu"]

    def planned(*given: str, **options: Any) -> Plan:
        return plan(*parse_settings(dct.DCTArguments, [str(stage_2), *more, *given]), **options)

    lora = planned()
    weights = 8.4e9  # as its card says, in bfloat16
    assert lora.frozen == pytest.approx(2 * weights, rel=0.02)
    adapters = 32 * 4 * 128 * 2 * 4096
    assert lora.trained == adapters * (4 + 4 + 8)
    assert planned(gpus=8, sharding="zero2").trained == pytest.approx(adapters * (4 + 12 / 8))
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert lora.frozen - planned("--tuning", "qlora").frozen == pytest.approx(layers * (2 - NF4_BYTES))
    assert planned("--tuning", "qlora").most_rows(24) >= 1 and lora.most_rows(80) > lora.most_rows(40) >= 1
    assert planned("--tuning", "full").most_rows(80) == 0
    assert planned("--tuning", "full", gpus=8, sharding="fsdp2").most_rows(80) >= 1


@pytest.mark.parametrize("stage", ["vocab_size: 30", pytest.param("tuning: lora", marks=pytest.mark.slow)])
def test_the_command_says_what_fits(stage, checkpoint, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {checkpoint}\n{stage}\nper_device_train_batch_size: 3\n")
    assert cli.main(["plan-training", str(recipe), "--gpus", "2", "--sharding", "zero2"]) == 0
    said = capsys.readouterr().out
    assert "3 rows of 30 s on each GPU (2, sharding zero2)" in said
    for line in ("frozen weights", "trained weights", "as the recipe says"):
        assert line in said
    assert ("with --tuning qlora" in said) == ("tuning" in stage)


def test_a_recipe_of_no_stage_is_refused_in_a_sentence(checkpoint, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {checkpoint}\n")
    assert cli.main(["plan-training", str(recipe)]) == 1
    assert "could be for either stage" in capsys.readouterr().err


def test_the_stage_is_told_by_its_settings():
    recipes = ROOT / "train" / "recipes"
    assert stage_of(str(recipes / "ctc-qwen2-audio-7b.yaml")) is ctc.CTCArguments
    assert stage_of(str(recipes / "dct-qwen2-audio-7b.yaml")) is dct.DCTArguments
