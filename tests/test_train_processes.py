"""Two processes that share a step learn what one does, resume exactly and save a whole model, however they share."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import test_align
import torch
from safetensors.torch import load_file
from test_train import arguments

from fastlongspeech.train import align, ctc, dct, summary

ROOT = Path(__file__).parents[1]
STAGES = {"ctc": ctc, "align": align, "dct": dct, "summary": summary}
# Every interval draws its ratio, in the middle of the run from another set.
SUMMARIES = ["--interval", 16, "--curriculum", "2", "2,4", "--curriculum_steps", 2, "--lora_r", 4, "--lora_dropout", 0]


def launch(configuration: str, runs: list, folder: Path) -> None:
    """Runs stages in two processes of a configuration in `train/accelerate`, but on the CPU and in float32."""
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "train" / "accelerate" / f"{configuration}.yaml")]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", str(ROOT / "tests" / "two_processes.py"), str(folder / "runs.json")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-6000:]


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def settings(name: str, checkpoint: Path, data: Path, output: Path, *more: object) -> list[str]:
    if name == "align":
        return test_align.arguments(checkpoint, data, output, *more)
    own = {"own": SUMMARIES} if name == "summary" else {}
    return arguments(STAGES[name], checkpoint, data, output, *more, **own)


def compare(configuration: str, stages: list[str], checkpoint: Path, data: Path, folder: Path) -> None:
    more = ["--save_strategy", "steps", "--save_steps", 3, "--logging_steps", 1]  # three is within the second epoch
    half = [*more, "--per_device_train_batch_size", 2]
    runs: list = []
    for name in stages:
        output, resumed = folder / f"{name}-two", folder / f"{name}-resumed"
        runs += [[STAGES[name].__name__, settings(name, checkpoint, data, output, *half)]]
        runs += [["copy", [str(output), str(resumed)]]]
        runs += [[STAGES[name].__name__, settings(name, checkpoint, data, resumed, *half)]]
    launch(configuration, runs, folder)
    for name in stages:
        STAGES[name].main(settings(name, checkpoint, data, folder / f"{name}-one", *more))
        one = load_file(folder / f"{name}-one" / "model.safetensors")
        two = load_file(folder / f"{name}-two" / "model.safetensors")
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
        assert losses(folder / f"{name}-two") == pytest.approx(losses(folder / f"{name}-one"), rel=1e-4)
        assert len(losses(folder / f"{name}-two")) == 4
        again = load_file(folder / f"{name}-resumed" / "model.safetensors")
        torch.testing.assert_close(again, two, rtol=0, atol=0)


@pytest.mark.parametrize("configuration", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_two_processes_learn_what_one_does_in_every_stage(configuration, checkpoint, data, tmp_path):
    compare(configuration, ["ctc", "align", "dct"], checkpoint, data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["ddp", "fsdp2"])
def test_two_processes_that_teach_to_sum_up(configuration, checkpoint, data, tmp_path):
    compare(configuration, ["summary"], checkpoint, data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ctc", "dct"])
@pytest.mark.parametrize("configuration", ["zero2", "zero3"])
def test_two_processes_of_deepspeed(configuration, stage, checkpoint, data, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is in no extra; install it with: pip install deepspeed")
    compare(configuration, [stage], checkpoint, data, tmp_path)
