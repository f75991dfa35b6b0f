"""Both training stages: only what should train does, runs can be killed and resumed, settings are checked."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import yaml
from conftest import CLIP_SECONDS, write_rows
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, TrainingArguments

from fastlongspeech import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from fastlongspeech.app.hosts import find_host
from fastlongspeech.compression_fastlongspeech import COMPRESSIONS, average_pooling
from fastlongspeech.train import ctc, dct
from fastlongspeech.train.stage import StageTrainer, last_checkpoint, parse_settings


def arguments(stage, model: Path, data: Path, output: Path, *more: object, own: list | None = None) -> list[str]:
    """Four steps of four rows at a learning rate that shows; `own` are the stage's own settings."""
    manifest = data / ("asr.jsonl" if stage is ctc else "qa.jsonl")
    if own is None:
        own = ["--lora_r", 4, "--lora_dropout", 0, "--target_lengths", 9, 5, 2]
        own = ["--vocab_size", 30] if stage is ctc else own
    settings = ["--model", model, "--train_data", manifest, "--output_dir", output, *own, "--max_steps", 4]
    settings += ["--per_device_train_batch_size", 4, "--learning_rate", 0.02, "--lr_scheduler_type", "constant"]
    settings += ["--optim", "sgd", "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no", *more]
    return [str(setting) for setting in settings]


def trained(stage, model: Path, data: Path, output: Path, *more: object) -> dict[str, torch.Tensor]:
    """The weights a run ends with."""
    stage.main(arguments(stage, model, data, output, *more))
    return load_file(output / "model.safetensors")


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# Stage 1


def test_stage_1_trains_a_fresh_ctc_decoder_alone_and_leaves_a_complete_folder(checkpoint, data, tmp_path, capsys):
    evaluation = ["--eval_data", data / "asr.jsonl", "--eval_strategy", "steps", "--eval_steps", 4]
    after = trained(ctc, checkpoint, data, tmp_path / "out", *evaluation)
    before = load_file(checkpoint / "model.safetensors")
    assert changed(before, after) == {name for name in before if ".ctc_decoder." in name}

    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    processor = FastLongSpeechProcessor.from_pretrained(tmp_path / "out")
    assert (model.config.content_density, model.config.ctc_vocab_size, processor.ctc_vocab_size) == ("ctc", 30, 30)
    assert not hasattr(model.config, "use_cache")
    inputs = processor(audio=str(data / "clips" / "1.wav"))
    assert isinstance(processor.ctc_decode(model.ctc_transcribe(**inputs))[0], str)
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert {"eval_loss", "eval_wer"} <= set().union(*log)
    assert "learning_rate: 0.02\n" in capsys.readouterr().out


def test_evaluation_transcribes_with_the_weights_of_the_moment(checkpoint, data, tmp_path, monkeypatch):
    found: list[list[list[int]]] = []
    prediction_step = ctc.CTCTrainer.prediction_step

    def spy(self, *args, **kwargs):
        loss, ids, labels = prediction_step(self, *args, **kwargs)
        found.append([row[row >= 0].tolist() for row in ids])
        return loss, ids, labels

    monkeypatch.setattr(ctc.CTCTrainer, "prediction_step", spy)
    more = ["--eval_data", data / "asr.jsonl", "--eval_strategy", "steps", "--eval_steps", 2]
    trained(ctc, checkpoint, data, tmp_path / "out", *more, "--optim", "adamw_torch_fused", "--learning_rate", 0.5)
    model = FastLongSpeechForConditionalGeneration.from_pretrained(tmp_path / "out")
    clips = [str(data / "clips" / f"{number}.wav") for number in range(len(CLIP_SECONDS))]
    inputs = FastLongSpeechProcessor.from_pretrained(tmp_path / "out")(audio=clips)
    assert len(found) == 2 and found[0] != found[1]
    assert found[1] == model.ctc_transcribe(**inputs)


def test_stage_1_starts_from_a_qwen2_audio_checkpoint(checkpoint, data, tmp_path):
    model = FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint)
    vanilla = {k: v for k, v in model.state_dict().items() if ".ctc_decoder." not in k}
    model.save_pretrained(tmp_path / "vanilla", state_dict=vanilla)
    FastLongSpeechProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "vanilla")
    trained(ctc, tmp_path / "vanilla", data, tmp_path / "out")
    assert FastLongSpeechForConditionalGeneration.from_pretrained(tmp_path / "out").config.content_density == "ctc"


def test_stage_1_takes_an_existing_vocabulary(checkpoint, ctc_model, data, tmp_path):
    trained(ctc, checkpoint, data, tmp_path / "out", "--ctc_model", ctc_model)
    assert (tmp_path / "out" / "ctc.model").read_bytes() == ctc_model.read_bytes()


def test_stage_1_can_use_the_language_models_own_tokens_and_projector(checkpoint, data, tmp_path):
    options = ["--vocab_size", 0, "--ctc_projector", False]
    weights = trained(ctc, checkpoint, data, tmp_path / "run", *options)
    assert [name for name in weights if "ctc_decoder" in name] == ["model.ctc_decoder.linear.weight"]
    processor = FastLongSpeechProcessor.from_pretrained(tmp_path / "run")
    assert not (tmp_path / "run" / "ctc.model").exists() and processor.ctc_vocab_size == 0
    assert len(weights["model.ctc_decoder.linear.weight"]) == len(weights["lm_head.weight"]) + 1
    model = FastLongSpeechForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert model.config.ctc_vocab_size == 0 and model.config.content_density == "ctc"
    inputs = processor(audio=np.ones(16000), sampling_rate=16000)
    assert isinstance(processor.ctc_decode(model.ctc_transcribe(**inputs))[0], str)


def test_the_vocabulary_is_deterministic_keeps_every_transcript_and_has_the_size_asked_for():
    texts = ["The CAT sat, on a hill!"] * 5 + ["long " * 2000 + "zebra"]
    model = ctc.build_vocabulary(texts, 40)
    assert model == ctc.build_vocabulary(texts, 40)
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert len(vocabulary) == 40
    assert vocabulary.decode(vocabulary.encode("The CAT, zebra!")) == "The CAT, zebra!"
    with pytest.raises(ValueError, match="vocab_size 5000 does not fit the transcripts: .* <= "):
        ctc.build_vocabulary(texts, 5000)
    with pytest.raises(ValueError, match="vocab_size 3 does not fit the transcripts: .*Increase vocab_size"):
        ctc.build_vocabulary(texts, 3)


def test_a_transcript_longer_than_its_recording_is_refused(checkpoint, data, tmp_path):
    clip = str(data / "clips" / "1.wav")  # 1 s: 25 frames
    write_rows(tmp_path / "asr.jsonl", [{"audio": clip, "text": "a dog"}, {"audio": clip, "text": "a cat " * 20}])
    with pytest.raises(ValueError, match="line 2 has a transcript that needs .* frames, its recording has 25"):
        ctc.main(arguments(ctc, checkpoint, tmp_path, tmp_path / "out", "--vocab_size", 12))


# Stage 2


def test_stage_2_trains_lora_on_the_language_model_alone_and_merges_it(checkpoint, data, tmp_path):
    evaluation = ["--eval_data", data / "qa.jsonl", "--eval_strategy", "steps", "--eval_target_lengths", 9, 2]
    after = trained(
        dct, checkpoint, data, tmp_path / "out", *evaluation, "--eval_steps", 4, "--save_strategy", "steps"
    )
    before = load_file(checkpoint / "model.safetensors")
    projections = {n for n in before if re.fullmatch(r"model\.language_model\.layers\..*[qkvo]_proj\.weight", n)}
    assert len(projections) == 4 and changed(before, after) == projections
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert {"eval_L9_loss", "eval_L2_loss"} <= set().union(*log)

    merged = FastLongSpeechForConditionalGeneration.from_pretrained(tmp_path / "out")
    base = FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "checkpoint-4").eval()
    assert merged.config.target_lengths == [9, 5, 2]
    batch = FastLongSpeechProcessor.from_pretrained(tmp_path / "out")(
        text="<|audio_bos|><|AUDIO|><|audio_eos|>Who?", audio=str(data / "clips" / "0.wav"), target_length=20
    )
    torch.testing.assert_close(merged(**batch).logits, adapted(**batch).logits, rtol=1e-4, atol=1e-5)


def test_stage_2_trains_through_the_compression_it_is_told_and_saves_it(checkpoint, data, tmp_path, monkeypatch):
    lengths = []

    def compress(frames, recordings, targets, settings):
        lengths.append(int(targets.max()))
        return average_pooling(frames, recordings, targets, settings)

    monkeypatch.setitem(COMPRESSIONS, "average_pooling", compress)
    trained(dct, checkpoint, data, tmp_path / "out", "--compression", "average_pooling")
    assert len(lengths) == 4 and set(lengths) <= {9, 5, 2}
    model = FastLongSpeechForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.config.compression == "average_pooling"
    trained(dct, checkpoint, data, tmp_path / "whole", "--compression", "none")
    assert len(lengths) == 4
    with pytest.raises(ValueError, match="compression must be one of iterative_fusion, .*, none; got 'zip'"):
        dct.main(arguments(dct, checkpoint, data, tmp_path / "zip", "--compression", "zip"))
    assert not (tmp_path / "zip").exists()


# Both stages


@pytest.mark.parametrize("stage", [ctc, dct])
def test_what_is_frozen_has_no_dropout(stage, checkpoint, data, tmp_path, monkeypatch):
    modes: set[tuple[str, bool]] = set()
    forward = FastLongSpeechForConditionalGeneration.forward

    def spy(self, *args, **kwargs):
        modes.update((name, part.training) for name, part in self.model.named_children())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(FastLongSpeechForConditionalGeneration, "forward", spy)
    trained(stage, checkpoint, data, tmp_path / "out", "--max_steps", 1)
    trains = "ctc_decoder" if stage is ctc else "language_model"
    parts = {"audio_tower", "multi_modal_projector", "language_model", "ctc_decoder"}
    assert modes == {(part, part == trains) for part in parts}


@pytest.mark.parametrize("stage", [ctc, dct])
def test_accumulation_and_workers_do_not_change_what_is_learnt(stage, checkpoint, data, tmp_path):
    whole = trained(stage, checkpoint, data, tmp_path / "whole")
    accumulated = ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4]
    parts = trained(stage, checkpoint, data, tmp_path / "parts", *accumulated, "--dataloader_num_workers", 2)
    assert changed(load_file(checkpoint / "model.safetensors"), whole)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [ctc, dct])
def test_batches_by_frames_use_every_row_and_resume(stage, checkpoint, data, tmp_path, monkeypatch):
    seen: list[int] = []
    compute_loss = StageTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        seen.append(len(inputs["windows_per_audio"]))
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "compute_loss", spy)
    more = ["--frames_per_batch", 800, "--save_strategy", "steps", "--save_steps", 3]  # 31 s, and all others together
    whole = trained(stage, checkpoint, data, tmp_path / "whole", *more)
    assert sorted(seen[:2]) == sorted(seen[2:]) == [1, 5]
    assert changed(load_file(checkpoint / "model.safetensors"), whole)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "killed" / "checkpoint-3")
    shutil.copy(tmp_path / "whole" / "settings.yaml", tmp_path / "killed")
    if stage is ctc:
        shutil.copy(tmp_path / "whole" / "ctc.model", tmp_path / "killed")
    assert not changed(whole, trained(stage, checkpoint, data, tmp_path / "killed", *more))


@pytest.mark.parametrize("stage", [ctc, dct])
def test_frozen_weights_may_be_bfloat16_while_what_trains_is_float32(stage, checkpoint, data, tmp_path, monkeypatch):
    seen: set[tuple[bool, torch.dtype]] = set()
    training_step = StageTrainer.training_step

    def spy(self, model, *args, **kwargs):
        seen.update((weight.requires_grad, weight.dtype) for weight in model.parameters())
        return training_step(self, model, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", spy)
    more = ["--dtype", "bfloat16", "--bf16", *([] if stage is ctc else ["--gradient_checkpointing"])]
    after = trained(stage, checkpoint, data, tmp_path / "out", *more)
    assert seen == {(False, torch.bfloat16), (True, torch.float32)}
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    assert all(weight.isfinite().all() for weight in after.values())
    before = {name: weight.bfloat16() for name, weight in load_file(checkpoint / "model.safetensors").items()}
    trains = "ctc_decoder" if stage is ctc else "language_model"
    assert changed(before, after) and all(trains in name for name in changed(before, after))


@pytest.mark.parametrize("stage", [ctc, dct])
def test_float16_has_the_loss_and_the_gradients_of_float32(stage, checkpoint, processor, data):
    # The Trainer mixes float16 on accelerators alone, so a step is written out, with its scaled loss.
    audio = [str(data / "clips" / f"{number}.wav") for number in (1, 2)]
    if stage is ctc:
        inputs = processor(audio=audio, ctc_text=["the cat", "a dog"])
    else:
        prompt = "<|audio_bos|><|AUDIO|><|audio_eos|>Who?"
        inputs = processor(audio=audio, text=[prompt, prompt], answers=["the cat", "a dog"], target_length=9)

    def step(dtype: str) -> tuple[float, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        host = find_host(str(checkpoint))
        of_both: dict[str, Any] = {"model": str(checkpoint), "train_data": "", "dtype": dtype}
        if stage is ctc:
            model = ctc.load_model(host, ctc.CTCArguments(**of_both), processor.ctc_vocab_size)
            model.model.ctc_decoder.to(torch.float32).requires_grad_(True)
        else:
            settings = dct.DCTArguments(**of_both, lora_r=4, lora_dropout=0.0)
            model = dct.make_trainable(dct.load_model(host, settings), settings)
        with torch.autocast("cpu", torch.float16, enabled=dtype == "float16"):
            loss = model(**inputs).loss
        (1024 * loss).backward()
        trains = {name: weight.grad / 1024 for name, weight in model.named_parameters() if weight.requires_grad}
        return loss.item(), trains

    loss, gradients = step("float16")
    expected, exact = step("float32")
    assert loss == pytest.approx(expected, rel=0.01)
    assert gradients.keys() == exact.keys()
    largest = max(gradient.abs().max() for gradient in exact.values()).item()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, exact[name], rtol=0.05, atol=0.01 * largest)


@pytest.mark.parametrize("stage", [ctc, dct])
def test_a_killed_run_goes_on_as_if_it_had_not_been(stage, checkpoint, data, tmp_path, monkeypatch, capsys):
    more = ["--max_steps", 5, "--per_device_train_batch_size", 2, "--save_strategy", "steps", "--save_steps", 1]
    more += ["--optim", "adamw_torch", *([] if stage is ctc else ["--lora_dropout", 0.3])]
    whole = trained(stage, checkpoint, data, tmp_path / "whole", *more)

    training_step = StageTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 4:  # within the second epoch of three steps
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    output = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageTrainer, "training_step", killed)
        trained(stage, checkpoint, data, output, *more)
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-5")
    (output / "checkpoint-5" / "trainer_state.json").write_text('{"epoch": ')  # killed while it was written
    assert last_checkpoint(output) == str(output / "checkpoint-4")

    capsys.readouterr()
    resumed = trained(stage, checkpoint, data, output, *more, "--logging_steps", 1)
    printed = capsys.readouterr().out
    assert f"# resuming from {output / 'checkpoint-4'}\n" in printed
    assert "# logging_steps was None when this run began\n" in printed
    assert not changed(whole, resumed)


@pytest.mark.parametrize("stage", [ctc, dct])
def test_a_run_killed_before_its_export_takes_no_further_step(stage, checkpoint, data, tmp_path, monkeypatch):
    # Four steps are one epoch of three and a part of the next.
    more = ["--per_device_train_batch_size", 2, "--save_strategy", "steps", "--save_steps", 1]
    whole = trained(stage, checkpoint, data, tmp_path / "whole", *more)

    def killed(*args):
        raise KeyboardInterrupt

    output = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "export", killed)
        trained(stage, checkpoint, data, output, *more)
    assert last_checkpoint(output) == str(output / "checkpoint-4")

    resumed = trained(stage, checkpoint, data, output, *more)
    assert not changed(whole, resumed)
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.parametrize("stage", [ctc, dct])
def test_nothing_is_overwritten(stage, checkpoint, data, tmp_path):
    trained(stage, checkpoint, data, tmp_path / "out", "--max_steps", 1)
    with pytest.raises(ValueError, match="already holds a finished model; choose another, or delete it"):
        trained(stage, checkpoint, data, tmp_path / "out")
    with pytest.raises(ValueError, match="is not empty and holds no run to resume"):
        trained(stage, checkpoint, data, data)


# Settings


def test_a_recipe_is_read_and_the_command_line_wins(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: base\ntrain_data: qa.jsonl\noutput_dir: out\nuse_cpu: true\nlearning_rate: 1e-3\n"
        "target_lengths: [9, 5]\ndisable_tqdm: false\nlr_scheduler_kwargs: {num_cycles: 2}\neval_data: null\n"
    )
    settings, training = parse_settings(dct.DCTArguments, [str(recipe), "--target_lengths", "4", "--seed=3"])
    assert (settings.model, settings.target_lengths, settings.eval_data) == ("base", [4], None)
    assert (training.learning_rate, training.seed, training.disable_tqdm) == (1e-3, 3, False)
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(
    "more, fault",
    [
        (["--learnin_rate", "1"], "sets 'learnin_rate', which is no setting; did you mean learning_rate"),
        (["--lora_r", "1"], "sets 'lora_r', which is no setting"),
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--dtype", "bfloat16"], "dtype bfloat16 needs mixed precision; set bf16 or fp16"),
        (["--save_only_model"], "save_only_model is true, which leaves nothing to resume from"),
        (["--eval_data", "x.jsonl"], "eval_data is 'x.jsonl' with eval_strategy 'no'; set both"),
        (["--output_dir", ""], "output_dir is not set"),
    ],
)
def test_settings_that_make_no_sense_are_refused(more, fault):
    given = ["--model", "base", "--train_data", "a.jsonl", "--output_dir", "out", "--use_cpu"]
    with pytest.raises(ValueError, match=fault):
        parse_settings(ctc.CTCArguments, given + more)


def test_one_process_for_several_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="one process sees 2 GPUs; use accelerate launch"):
        parse_settings(ctc.CTCArguments, ["--model", "m", "--train_data", "a", "--output_dir", "o", "--use_cpu"])


def test_lengths_below_one_are_refused(checkpoint, data, tmp_path):
    with pytest.raises(ValueError, match=r"eval_target_lengths must be positive integers, got \[9, 0\]"):
        dct.main(arguments(dct, checkpoint, data, tmp_path / "out", "--eval_target_lengths", 9, 0))


def test_an_unknown_name_in_a_recipe_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: base\nlearning-rate: 1\n")
    with pytest.raises(ValueError, match="recipe.yaml sets 'learning-rate', .* did you mean learning_rate"):
        parse_settings(ctc.CTCArguments, [str(tmp_path / "recipe.yaml")])


@pytest.mark.parametrize("stage, arguments_of", [(ctc, ctc.CTCArguments), (dct, dct.DCTArguments)])
def test_the_recipes_for_the_7b_model_are_complete_but_for_the_data(stage, arguments_of, monkeypatch):
    name = stage.__name__.rpartition(".")[2]
    recipe = Path(stage.__file__).parent / "recipes" / f"{name}-qwen2-audio-7b.yaml"
    given = yaml.safe_load(recipe.read_text())
    settings, training = parse_settings(arguments_of, [str(recipe), "--train_data", "a.jsonl", "--use_cpu"])
    assert {**vars(settings), **training.to_dict()}.items() >= {k: v for k, v in given.items() if v != []}.items()
