"""What a run leaves beside its model, so that it can be told apart and made again.

- `settings.yaml`: every setting, see `stage.py`;
- `run.json`: the data's fingerprint, and for every start its time, versions, commit and machine;
- `losses.png`: the losses of training and evaluation;
- `README.md`: a model card, written from these.

`--report_to tensorboard` or `trackio` shows the curves while the run goes on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

RECORD, CURVES, CARD = "run.json", "losses.png", "README.md"
PACKAGES = ("fastlongspeech", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed")


def record_start(output: Path, training: TrainingArguments, rows: Mapping[str, Any]) -> None:
    """Adds a start to the record of a run; says so where the data is no longer what it was at the first.

    Args:
        output: the run's folder.
        training: its settings.
        rows: by their name in the settings, such as `train_data`.
    """
    if training.process_index:
        return
    path = output / RECORD
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"data": {}, "starts": []}
    data = {name: describe_rows(part) for name, part in rows.items() if part is not None}
    for name, description in data.items():
        if before["data"].get(name, description) != description:
            print(f"# {name} is not what it was when this run began; see {path}", flush=True)
    start = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **versions()},
        "commit": commit(),
        "machine": f"{training.world_size} x {torch.cuda.get_device_name() if training.n_gpu else 'CPU'}",
        "data": data,
    }
    record = {"data": before["data"] or data, "starts": [*before["starts"], start]}
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")


def describe_rows(rows: Any) -> dict[str, Any]:
    """Returns the number of rows, their hours, and a fingerprint of their order, durations and texts.

    A stream has none of these before it is read, so that it says so.
    """
    if not hasattr(rows, "durations"):
        return {"rows": "a stream", "hours": "unknown", "fingerprint": "none"}
    digest = hashlib.blake2b(digest_size=16)
    for place, seconds in zip(rows.places, rows.durations, strict=True):
        digest.update(f"{place} {seconds:.3f}\n".encode())
    for part in getattr(rows, "parts", [rows]):
        if isinstance(part.rows, list):
            digest.update(json.dumps([_texts(row) for row in part.rows], default=str).encode())
        else:
            digest.update(str(getattr(part.rows, "_fingerprint", "")).encode())
    return {"rows": len(rows), "hours": round(sum(rows.durations) / 3600, 2), "fingerprint": digest.hexdigest()}


def _texts(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "audio"}


def versions() -> dict[str, str]:
    """Returns the versions of what trains, as far as it is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def commit() -> str | None:
    """Returns the commit of this checkout, with a plus where files differ from it; None where it is no checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != Path(__file__).resolve().parents[1]:
            return None  # installed inside another repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_card(output: Path, stage: str, log: list[dict[str, Any]]) -> None:
    """Writes the losses as a picture, and the model card.

    Args:
        output: the run's folder, with its settings and record.
        stage: what was trained, a sentence.
        log: what the Trainer logged, its `log_history`.
    """
    draw_losses(log, output / CURVES)
    settings = yaml.safe_load((output / "settings.yaml").read_text(encoding="utf-8"))
    record = json.loads((output / RECORD).read_text(encoding="utf-8"))
    last = record["starts"][-1]
    base = str(settings["model"])
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "audio-text-to-text"}
    front["tags"] = ["speech", "long-audio", "fastlongspeech"]
    if base.count("/") == 1 and not Path(base).exists():
        front["base_model"] = base
    data = [
        f"| {name} | {settings.get(name)} | {part['rows']} | {part['hours']} | `{part['fingerprint']}` |"
        for name, part in record["data"].items()
    ]
    losses = [
        f"| {name} | {series[0][1]:.4f} | {series[-1][1]:.4f} | {series[-1][0]} |"
        for name, series in curves(log).items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        f"# {output.resolve().name}",
        "",
        f"{stage} It began as `{base}`.",
        "",
        "Trained with FastLongSpeech; this card was written by the run. What the model is good for, what it can't do",
        "and the licence of its data are for you to add.",
        "",
        "## Data",
        "",
        "| | source | rows | hours | fingerprint |",
        "|---|---|---|---|---|",
        *data,
        "",
        "## Losses",
        "",
        f"![losses]({CURVES})",
        "",
        "| | first | last | at step |",
        "|---|---|---|---|",
        *losses,
        "",
        "## Settings",
        "",
        "```yaml",
        yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip(),
        "```",
        "",
        "## Made with",
        "",
        f"{versions}; commit {last['commit'] or 'unknown'}; {last['machine']}; started {len(record['starts'])} times.",
        "",
    ]
    (output / CARD).write_text("\n".join(lines), encoding="utf-8")


def curves(log: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Returns the steps and values of every loss and word error rate that a Trainer logged, by name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in log:
        for name, value in entry.items():
            if name == "loss" or (name.startswith("eval_") and name.endswith(("_loss", "_wer"))):
                found.setdefault("training loss" if name == "loss" else name, []).append((entry["step"], value))
    return found


def draw_losses(log: list[dict[str, Any]], path: Path) -> None:
    """Draws the curves of a log into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, series in curves(log).items():
        axes.plot(*zip(*series, strict=True), label=name, marker="." if len(series) < 50 else None)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per label), or word error rate")
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)
