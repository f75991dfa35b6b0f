"""Two processes that share a step learn what one does, resume exactly and save a whole model, however they share."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import arguments, trained

from fastlongspeech.train import ctc, dct

ROOT = Path(__file__).parents[1]
STAGES = {"ctc": ctc, "dct": dct}


def launch(configuration: str, runs: list, folder: Path) -> None:
    """Runs stages in two processes of a configuration in `train/accelerate`, but on the CPU and in float32."""
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "train" / "accelerate" / f"{configuration}.yaml")]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", str(ROOT / "tests" / "two_processes.py"), str(folder / "runs.json")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:]


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def compare(configuration: str, stages: list[str], checkpoint: Path, data: Path, folder: Path) -> None:
    more = ["--save_strategy", "steps", "--save_steps", 3, "--logging_steps", 1]  # three is within the second epoch
    runs: list = []
    for name in stages:
        stage, output = STAGES[name], folder / f"{name}-two"
        run = [stage.__name__, arguments(stage, checkpoint, data, output, *more, "--per_device_train_batch_size", 2)]
        resumed = folder / f"{name}-resumed"
        runs += [run, ["copy", [str(output), str(resumed)]]]
        runs += [
            [stage.__name__, arguments(stage, checkpoint, data, resumed, *more, "--per_device_train_batch_size", 2)]
        ]
    launch(configuration, runs, folder)
    for name in stages:
        one = trained(STAGES[name], checkpoint, data, folder / f"{name}-one", *more)
        two = load_file(folder / f"{name}-two" / "model.safetensors")
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
        assert losses(folder / f"{name}-two") == pytest.approx(losses(folder / f"{name}-one"), rel=1e-4)
        assert len(losses(folder / f"{name}-two")) == 4
        again = load_file(folder / f"{name}-resumed" / "model.safetensors")
        torch.testing.assert_close(again, two, rtol=0, atol=0)


def test_two_processes_that_share_out_the_weights_of_stage_2(checkpoint, data, tmp_path):
    compare("fsdp2", ["dct"], checkpoint, data, tmp_path)


@pytest.mark.slow
def test_two_processes_that_share_out_the_weights_of_stage_1(checkpoint, data, tmp_path):
    compare("fsdp2", ["ctc"], checkpoint, data, tmp_path)


@pytest.mark.slow
def test_two_processes_with_the_whole_model_each(checkpoint, data, tmp_path):
    compare("ddp", ["ctc", "dct"], checkpoint, data, tmp_path)
