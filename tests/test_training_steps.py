"""The step by step of docs/training.md, as it is written there, on a few clips."""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from conftest import CLIP_TEXTS, write_rows

from fastlongspeech.app import cli

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").partition("## Step by step")[2]


def block(language: str) -> str:
    """Returns the first block in a language of the step by step."""
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)[0]


@pytest.mark.slow
def test_the_step_by_step_leads_from_clips_to_an_answer(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    (tmp_path / "clips").symlink_to(data / "clips")
    asked = [(f"clips/{number}.wav", text.split()[1]) for number, text in enumerate(CLIP_TEXTS)]
    rows = [{"audio": clip, "question": "Who calls?", "answer": answer} for clip, answer in asked]
    write_rows(tmp_path / "clips.jsonl", rows[1:])
    write_rows(tmp_path / "held-out.jsonl", rows[:2])
    (tmp_path / "mine.yaml").write_text(block("yaml"))
    monkeypatch.chdir(tmp_path)
    for line in block("bash").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["python", "-m"]:
            import_module(words[2]).main(words[3:])
        else:
            assert words[0] == "fastlongspeech"
            capsys.readouterr()
            assert cli.main(words[1:]) == 0
            assert capsys.readouterr().out.strip()
    assert (tmp_path / "runs" / "mine" / "README.md").exists()
    log = json.loads((tmp_path / "runs" / "mine" / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_L750_loss" in entry for entry in log) == 3


@pytest.mark.parametrize("configuration", sorted((ROOT / "train" / "accelerate").glob("*.yaml")))
def test_every_configuration_is_in_the_guide_and_can_be_read_by_accelerate(configuration):
    from accelerate.commands.config.config_args import load_config_from_file

    assert f"(../train/accelerate/{configuration.name})" in GUIDE
    assert load_config_from_file(str(configuration)).num_processes >= 1
    assert f"--config_file train/accelerate/{configuration.name}" in configuration.read_text()
