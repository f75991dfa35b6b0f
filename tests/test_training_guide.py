"""The way of `docs/training.md` from a download to an evaluated model, run as it is written, small."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import CLIP_TEXTS
from test_prepare import save_common_voice

from fastlongspeech.app import cli
from fastlongspeech.train import ctc, dct

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    block = re.search(r"### From a download to an evaluated model\n\n```bash\n(.*?)```", GUIDE, re.DOTALL)
    return [shlex.split(line) for line in block[1].splitlines()] if block else []


@pytest.mark.slow
def test_both_stages_on_a_release_of_common_voice_from_prepare_to_evaluate(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").symlink_to(ROOT / "train")
    train = {f"common_voice_en_{n}": (2.0 + n / 10, CLIP_TEXTS[n % 6]) for n in range(12)}
    release = save_common_voice(tmp_path / "cv-corpus" / "en", "train", train | {"common_voice_en_99": (31.0, "x")})
    save_common_voice(release, "dev", {f"common_voice_en_5{n}": (1.5, CLIP_TEXTS[n]) for n in range(3)})

    small = ["--max_steps", "3", "--use_cpu", "--bf16", "false", "--dtype", "float32", "--disable_tqdm", "true"]
    small += ["--dataloader_num_workers", "0", "--per_device_train_batch_size", "2", "--report_to", "none"]
    stages: dict[str, tuple[Callable, list[str]]] = {
        "fastlongspeech.train.ctc": (ctc.main, ["--model", str(checkpoint), "--vocab_size", "30", *small]),
        "fastlongspeech.train.dct": (dct.main, ["--lora_r", "4", "--target_lengths", "9", "5", *small]),
    }
    run = []
    for words in commands():
        if words[0] == "fastlongspeech":
            tiny = ["--target-length", "9", "--max-new-tokens", "5"] if words[1] == "evaluate" else []
            assert cli.main(words[1:] + tiny) == 0
            run.append(words[1])
        else:
            assert words[:3] == ["accelerate", "launch", "-m"]
            main, smaller = stages[words[3]]
            main(words[4:] + smaller)
            run.append(words[3])
    assert run == ["prepare", "prepare", "check-data", *stages, "evaluate"]

    rows = [json.loads(line) for line in (tmp_path / "data" / "common-voice-train.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(row["text"] == row["answer"] for row in rows)
    settings = yaml.safe_load((tmp_path / "runs" / "dct-qwen2-audio-7b" / "settings.yaml").read_text())
    assert settings["model"] == "runs/ctc-qwen2-audio-7b"
    summary = json.loads((tmp_path / "results" / "common-voice" / "summary.json").read_text())
    predictions = (tmp_path / "results" / "common-voice" / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 3 and "exact" in json.dumps(summary)
