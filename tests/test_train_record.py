"""What a run leaves beside its model: settings, versions, commit, the data's fingerprint, curves and a model card."""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from conftest import write_rows
from PIL import Image
from test_align import arguments as align_arguments
from test_train import arguments

from fastlongspeech.data.manifests import load_rows
from fastlongspeech.train import align, ctc, dct, summary
from fastlongspeech.train.record import curves, describe_rows

MORE = ["--save_strategy", "steps", "--save_steps", 2, "--logging_steps", 1, "--eval_strategy", "steps"]
MORE += ["--eval_steps", 2]


@pytest.mark.parametrize("stage, manifest", [(ctc, "asr.jsonl"), (dct, "qa.jsonl")])
def test_a_run_leaves_a_record_curves_and_a_card(stage, manifest, checkpoint, data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "my-model"
    words = arguments(stage, checkpoint, data, output, *MORE, "--eval_data", data / manifest)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "export", killed)
        stage.main(words)
    stage.main(words)

    record = json.loads((output / "run.json").read_text())
    assert record["data"]["train_data"]["rows"] == 6 and record["data"].keys() == {"train_data", "eval_data"}
    first, second = record["starts"]
    assert first["versions"]["torch"] == version("torch") and first["machine"] == "1 x CPU"
    assert first["data"] == second["data"] == record["data"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    if head.returncode == 0:
        assert first["commit"].rstrip("+") == head.stdout.strip()
    with Image.open(output / "losses.png") as picture:
        assert picture.width > 500

    card = (output / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "base_model" not in front  # a folder is no Hub id
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    last = [entry["loss"] for entry in log if "loss" in entry][-1]
    for said in ("# my-model", "learning_rate: 0.02", f"{last:.4f}", record["data"]["train_data"]["fingerprint"]):
        assert said in card
    assert "started 2 times" in card and str(checkpoint) in card
    assert "is not what it was" not in capsys.readouterr().out


@pytest.mark.parametrize("stage", [align, summary])
def test_the_other_stages_leave_the_same(stage, checkpoint, data, tmp_path):
    words = align_arguments(checkpoint, data, tmp_path, "--logging_steps", 1, "--max_steps", 1)
    if stage is summary:
        own = ["--interval", 16, "--curriculum", "2", "--lora_r", 4]
        words = arguments(summary, checkpoint, data, tmp_path, "--logging_steps", 1, "--max_steps", 1, own=own)
    stage.main(words)
    assert json.loads((tmp_path / "run.json").read_text())["data"]["train_data"]["rows"] == 6
    assert (tmp_path / "losses.png").exists() and "| training loss |" in (tmp_path / "README.md").read_text()


def test_the_fingerprint_follows_the_rows(data, tmp_path):
    columns = ("audio", "text")
    rows = [{"audio": str(data / "clips" / f"{number}.wav"), "text": text} for number, text in enumerate("abc", 1)]

    def fingerprint(name: str, rows: list) -> str:
        return describe_rows(load_rows(write_rows(tmp_path / f"{name}.jsonl", rows), columns))["fingerprint"]

    same = fingerprint("one", rows)
    assert fingerprint("other-name", rows) == same
    assert fingerprint("order", rows[::-1]) != same
    assert fingerprint("text", [*rows[:2], {**rows[2], "text": "d"}]) != same
    assert fingerprint("audio", [*rows[:2], {**rows[2], "audio": str(data / "clips" / "4.wav")}]) != same


def test_a_run_that_goes_on_with_other_data_says_so(checkpoint, data, tmp_path, monkeypatch, capsys):
    rows = [json.loads(line) for line in (data / "asr.jsonl").read_text().splitlines()]
    rows = [{**row, "audio": str(data / row["audio"])} for row in rows]
    write_rows(tmp_path / "asr.jsonl", rows)
    output = tmp_path / "out"
    words = arguments(ctc, checkpoint, tmp_path, output, *MORE[:6])

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ctc, "export", killed)
        ctc.main(words)
    write_rows(tmp_path / "asr.jsonl", rows[::-1])
    capsys.readouterr()
    ctc.main(words)
    assert f"# train_data is not what it was when this run began; see {output / 'run.json'}" in capsys.readouterr().out


def test_curves_are_what_the_trainer_logged():
    log = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_L9_loss": 2.5, "eval_runtime": 1.0}]
    assert curves(log) == {"training loss": [(1, 3.0), (2, 2.0)], "eval_L9_loss": [(2, 2.5)]}
