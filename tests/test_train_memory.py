"""Ways to train in less memory: 4 bits, half precision, checkpointed activations; and the whole language model."""

import re
from typing import Any

import bitsandbytes
import pytest
import soundfile
import torch
from conftest import RATE, speech, write_rows
from safetensors.torch import load_file
from test_train import arguments, changed, trained
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from fastlongspeech.modeling_fastlongspeech import FastLongSpeechEncoder
from fastlongspeech.train import ctc, dct
from fastlongspeech.train.stage import StageTrainer


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The model of every training step."""
    models: list[Any] = []
    training_step = StageTrainer.training_step

    def spy(self: StageTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        models.append(model)
        return training_step(self, model, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", spy)
    return models


def language_model(name: str) -> bool:
    return name.startswith("model.language_model.") or name == "lm_head.weight"


def test_qlora_quantises_the_layers_of_the_language_model_alone(checkpoint, data, tmp_path, seen):
    after = trained(dct, checkpoint, data, tmp_path / "out", "--tuning", "qlora", "--dtype", "bfloat16", "--bf16")
    model = seen[0].get_base_model()
    quantised = {n for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    layers = [f"model.language_model.layers.0.{block}" for block in ("self_attn", "mlp")]
    assert len(quantised) == 7 and all(name.startswith(tuple(layers)) for name in quantised)
    kinds = {m.weight.quant_type for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert kinds == {"nf4"}

    # The result is the whole model, not the quantised one, with the adapters merged into it.
    before = {name: weight.bfloat16() for name, weight in load_file(checkpoint / "model.safetensors").items()}
    attention = {n for n in before if re.fullmatch(r"model\.language_model\.layers\..*[qkvo]_proj\.weight", n)}
    assert changed(before, after) == attention
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}


def test_the_whole_language_model_trains_in_float32_and_nothing_else(checkpoint, data, tmp_path, seen):
    after = trained(dct, checkpoint, data, tmp_path / "out", "--tuning", "full", "--dtype", "bfloat16", "--bf16")
    trains = {name for name, weight in seen[0].named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in seen[0].parameters() if weight.requires_grad} == {torch.float32}
    before = {name: weight.bfloat16() for name, weight in load_file(checkpoint / "model.safetensors").items()}
    assert trains == {name for name in before if language_model(name)}
    assert changed(before, after) and changed(before, after) <= trains
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}


def test_a_run_of_the_whole_language_model_resumes(checkpoint, data, tmp_path, monkeypatch):
    more = ["--tuning", "full", "--save_strategy", "steps", "--save_steps", 2, "--learning_rate", 0.1]
    whole = trained(dct, checkpoint, data, tmp_path / "whole", *more)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dct, "export", killed)
        dct.main(arguments(dct, checkpoint, data, output, *more, "--max_steps", 4))
    (output / "checkpoint-4" / "trainer_state.json").unlink()
    assert not changed(whole, trained(dct, checkpoint, data, output, *more))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_checkpointed_activations_and_the_kind_of_attention_do_not_change_what_is_learnt(
    tuning, checkpoint, data, tmp_path
):
    plain = trained(dct, checkpoint, data, tmp_path / "plain", "--tuning", tuning, "--attn_implementation", "sdpa")
    more = ["--gradient_checkpointing", "--attn_implementation", "eager"]
    saved = trained(dct, checkpoint, data, tmp_path / "saved", "--tuning", tuning, *more)
    torch.testing.assert_close(saved, plain, rtol=1e-4, atol=1e-5)


def test_stage_1_leaves_the_layers_of_the_language_model_out_of_memory(checkpoint, data, tmp_path, seen):
    after = trained(ctc, checkpoint, data, tmp_path / "out")
    assert not [name for name, _ in seen[0].named_parameters() if name.startswith("model.language_model.layers.")]
    assert after.keys() == load_file(checkpoint / "model.safetensors").keys()


def test_a_recording_of_minutes_is_encoded_in_parts_and_read_as_a_short_one(checkpoint, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "talk.flac", speech(601.0), RATE)
    write_rows(tmp_path / "qa.jsonl", [{"audio": "talk.flac", "question": "Who?", "answer": "dog"}])
    windows: list[int] = []
    encode, forward = FastLongSpeechEncoder.forward, Qwen2Model.forward

    def spy_encoder(self, input_features, mel_frames):
        assert not torch.is_grad_enabled()  # nothing is kept for the backward pass
        windows.append(len(input_features))
        return encode(self, input_features, mel_frames)

    tokens: list[int] = []

    def spy_text(self, *args, **kwargs):
        tokens.append(kwargs["inputs_embeds"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(FastLongSpeechEncoder, "forward", spy_encoder)
    monkeypatch.setattr(Qwen2Model, "forward", spy_text)
    trained(dct, checkpoint, tmp_path, tmp_path / "out", "--max_steps", 1, "--per_device_train_batch_size", 1)
    assert sum(windows) == 21 and max(windows) == 2  # on a CPU; windows_per_batch elsewhere
    assert max(tokens) < 250  # the question, one token for a byte, and at most nine frames


def test_an_unknown_tuning_is_refused(checkpoint, data, tmp_path):
    with pytest.raises(ValueError, match="tuning must be one of lora, qlora, full, got 'dora'"):
        dct.main(arguments(dct, checkpoint, data, tmp_path / "out", "--tuning", "dora"))
    assert not (tmp_path / "out").exists()
