"""Measures what a training step takes with and without the feature cache, from the second epoch on.

    python -m fastlongspeech.speed.feature_cache --output speed/results/feature-cache-cpu.json

The demo model reads clips of 20 to 30 s (noise that changes like speech: the work depends on durations alone) in both
stages. The number is the median of processor seconds of a step, in which other programs of the machine do not show.
The data loader runs in the same process and is counted. The losses of both runs are compared as well; they differ by
what the cache's bfloat16 rounds away.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import soundfile
from transformers import TrainerCallback, trainer

from ..train import ctc, dct

DEMO = Path(__file__).parents[1] / "checkpoints" / "fastlongspeech-demo"
CLIPS, EPOCHS, RATE = 8, 3, 16_000
STAGES: dict[str, tuple[Any, list[str]]] = {
    "stage 1": (ctc, ["--vocab_size", "30"]),
    "stage 2, L = 50": (dct, ["--lora_r", "16", "--target_lengths", "50"]),
    "stage 2, L = 750": (dct, ["--lora_r", "16", "--target_lengths", "750"]),
}


class Clock(TrainerCallback):
    """Notes the processor seconds of every step after the first epoch."""

    seconds: list[float] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.before = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.process_time()
        if state.epoch > 1:
            self.seconds.append(now - self.before)
        self.before = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    callbacks.append(Clock)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_clips(Path(folder))
        for name, (stage, options) in STAGES.items():
            encoded, losses = train(stage, manifest, Path(folder, f"{name} encoded"), options)
            options = [*options, "--feature_cache", f"{folder}/cache"]
            cached, same = train(stage, manifest, Path(folder, f"{name} cached"), options)
            apart = max(abs(one / other - 1) for one, other in zip(same, losses, strict=True))
            results[name] = {"encoded_seconds": encoded, "cached_seconds": cached, "losses_apart": apart}
    print("| | encoded every time | cached | times as many steps | losses apart, at most |\n|---|---|---|---|---|")
    for name, found in results.items():
        encoded, cached, apart = found.values()
        print(f"| {name} | {encoded:.2f} s | {cached:.2f} s | {encoded / cached:.1f} | {apart:.2%} |")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def train(stage: Any, manifest: Path, output: Path, options: list[str]) -> tuple[float, list[float]]:
    """Returns the median seconds of a step after the first epoch, and the loss of every step."""
    Clock.seconds = []
    words = ["--model", str(DEMO), "--train_data", str(manifest), "--output_dir", str(output), *options]
    words += ["--num_train_epochs", str(EPOCHS), "--per_device_train_batch_size", "4", "--logging_steps", "1"]
    stage.main([*words, "--use_cpu", "--save_strategy", "no", "--report_to", "none"])
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return median(Clock.seconds), [entry["loss"] for entry in log if "loss" in entry]


def write_clips(folder: Path) -> Path:
    """Writes clips and their manifest, which both stages read, into a folder; returns the manifest's path."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(CLIPS):
        samples = int(random.uniform(20, 30) * RATE)
        loudness = np.repeat(random.uniform(0, 0.3, samples // 1600 + 1), 1600)[:samples]
        soundfile.write(folder / f"{number}.flac", loudness * random.standard_normal(samples) / 4, RATE)
        text = "the quick brown fox jumps over the lazy dog"
        rows.append({"audio": f"{number}.flac", "text": text, "question": "Who jumps?", "answer": "the fox"})
    manifest = folder / "clips.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


if __name__ == "__main__":
    main()
