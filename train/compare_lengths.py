"""Compares ways to draw the length L in stage 2, each trained for the same steps on the same questions.

    python -m fastlongspeech.train.compare_lengths MODEL OUTPUT --train-data TRAIN --held-out FILE LENGTH [LENGTH ...]

The paper draws one L for a batch, uniformly. The others: one L for each recording; weights that grow, or fall, with
the length; and a schedule that starts with the greatest lengths and takes in a shorter one at a time, until all are
there in the middle of the run. Prints the losses on held-out questions at fixed lengths, and writes them to
`comparison.json` in OUTPUT. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..app.markdown import table
from ..evaluation.journal import refuse_other
from . import dct
from .batches import DCTCollator
from .cache import FeatureCache, describe_encoder

DECISIVE = ("model", "train_data", "steps", "batch_size", "learning_rate")  # of what is trained
BATCH = 8  # held-out questions at a time
# Rows about the voice, or that ask for every word: their losses say little of what is kept of the content.
NOT_ABOUT_CONTENT = {"voice", "gender", "transcription", "transcribe", "repeat", "not_said"}


class PerRecording(DCTCollator):
    """Draws L for every recording of a batch, uniformly: a function of the seed, the step and the place of its row."""

    def draw_length(self, rows: list[dict[str, Any]]) -> list[int]:
        places = [(row["step"], zlib.crc32(f"{row['audio']} {row['question']}".encode())) for row in rows]
        return [int(np.random.default_rng((self.seed, *place)).choice(self.target_lengths)) for place in places]


class Weighted(DCTCollator):
    """Draws one L for a batch, with weights by its place among the lengths, the greatest first."""

    def weights(self, step: int) -> Sequence[float]:
        raise NotImplementedError

    def draw_length(self, rows: list[dict[str, Any]]) -> int:
        step = rows[0]["step"]
        weights = np.array(self.weights(step), dtype=float)
        lengths = sorted(self.target_lengths, reverse=True)
        return int(np.random.default_rng((self.seed, step)).choice(lengths, p=weights / weights.sum()))


class MoreLong(Weighted):
    """The greatest of seven lengths is drawn seven times as often as the shortest."""

    def weights(self, step: int) -> Sequence[float]:
        return range(len(self.target_lengths), 0, -1)


class MoreShort(Weighted):
    """The shortest of seven lengths is drawn seven times as often as the greatest."""

    def weights(self, step: int) -> Sequence[float]:
        return range(1, len(self.target_lengths) + 1)


class MildFirst(Weighted):
    """Only the greatest length at first, one more at a time, all from the middle of the run on."""

    steps = 40  # of the whole run

    def weights(self, step: int) -> Sequence[float]:
        allowed = math.ceil(len(self.target_lengths) * min(1.0, 2 * (step + 1) / self.steps))
        return [float(place < allowed) for place in range(len(self.target_lengths))]


WAYS = {
    "uniform": DCTCollator,
    "per recording": PerRecording,
    "more long": MoreLong,
    "more short": MoreShort,
    "mild first": MildFirst,
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of the model that every run starts from")
    parser.add_argument("output", type=Path, help="folder of the runs")
    parser.add_argument("--train-data", type=Path, required=True, help="rows with audio, question and answer")
    parser.add_argument(
        "--held-out",
        nargs="+",
        action="append",
        required=True,
        metavar="FILE LENGTH",
        help="rows that are not trained on, and the lengths that they are fused to; may be given again",
    )
    parser.add_argument(
        "--questions", type=int, nargs="+", default=[96], metavar="N", help="of all held-out files, or of each (96)"
    )
    parser.add_argument("--steps", type=int, default=40, help="of every run (default: 40)")
    parser.add_argument("--batch-size", type=int, default=8, help="questions of a step (default: 8)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default: 1e-3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="one run of every way for each (default: 1)")
    arguments = parser.parse_args(argv)
    try:
        arguments.held_out = [
            (Path(file), [int(length) for length in lengths]) for file, *lengths in arguments.held_out
        ]
    except ValueError:
        parser.error("--held-out takes a file and then its lengths, whole numbers of frames; correct it.")
    if not all(lengths for _, lengths in arguments.held_out):
        parser.error("--held-out needs at least one length after the file; add it.")
    if len(arguments.questions) not in (1, len(arguments.held_out)):
        parser.error(f"--questions takes one number, or one for each of {len(arguments.held_out)} held-out files.")
    if len(arguments.questions) == 1:
        arguments.questions *= len(arguments.held_out)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is not trained yet, measures it, and prints the table.

    Raises:
        ValueError: OUTPUT holds models that were trained otherwise, or a manifest has too few questions.
    """
    arguments = parse_arguments(argv)
    MildFirst.steps = arguments.steps
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = {name: str(getattr(arguments, name)) for name in DECISIVE}
    if (noted := arguments.output / "settings.json").exists():
        refuse_other(json.loads(noted.read_text(encoding="utf-8")), settings, arguments.output)
    noted.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    training = questions(arguments.train_data, arguments.output / "train.jsonl")
    held_out = []
    for place, ((file, lengths), number) in enumerate(zip(arguments.held_out, arguments.questions, strict=True), 1):
        held_out.append((questions(file, arguments.output / f"held-out-{place}.jsonl", number), lengths))
    results: dict[str, list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        for way in WAYS:
            losses: dict[str, float] = {}
            folder = arguments.output / f"{way.replace(' ', '-')}-{seed}"
            if not (folder / "config.json").exists():
                train(arguments, folder, training, WAYS[way], seed)
            for manifest, lengths in held_out:
                measured = measure(arguments, folder, manifest, lengths)
                losses |= {f"{manifest.stem}, {length}": loss for length, loss in measured}
            results.setdefault(way, []).append(losses)
            (arguments.output / "comparison.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    rows = [
        [way, *(f"{np.mean([losses[name] for losses in of_seeds]):.3f}" for name in of_seeds[0])]
        for way, of_seeds in results.items()
    ]
    print(table(["L is drawn", *results["uniform"][0]], rows))


def questions(manifest: Path, path: Path, number: int | None = None) -> Path:
    """Writes the questions of a manifest about what is said, so many of them or all, to a path, and returns it.

    Raises:
        ValueError: the manifest has fewer of them.
    """
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "audio" in row and row.get("kind", row.get("task")) not in NOT_ABOUT_CONTENT]
    if number is not None and number > len(rows):
        raise ValueError(f"{manifest} has {len(rows)} questions about what is said, not {number}; ask for fewer.")
    chosen = rows if number is None else random.Random(0).sample(rows, number)
    lines = [json.dumps({**row, "audio": str((manifest.parent / row["audio"]).resolve())}) for row in chosen]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def train(arguments: argparse.Namespace, folder: Path, manifest: Path, collator: type[DCTCollator], seed: int) -> None:
    """Trains the model in one way."""
    settings = {
        "model": arguments.model,
        "train_data": manifest,
        "output_dir": folder,
        "feature_cache": arguments.output / "features",
        "max_steps": arguments.steps,
        "per_device_train_batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "lora_r": 64,
        "lora_alpha": 128,
        "lora_dropout": 0,
        "seed": seed,
        "logging_steps": 10,
        "save_steps": 10,
        "save_total_limit": 1,
        "report_to": "none",
    }
    dct.main([f"--{name}={value}" for name, value in settings.items()], collator)


def measure(
    arguments: argparse.Namespace, folder: Path, manifest: Path, lengths: Sequence[int]
) -> list[tuple[int, float]]:
    """Returns every length with the loss of a trained model on the questions of a manifest, nats per token."""
    import torch

    from .. import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
    from ..data.manifests import load_rows

    processor = FastLongSpeechProcessor.from_pretrained(folder)
    model = FastLongSpeechForConditionalGeneration.from_pretrained(folder).eval()
    rows = load_rows(manifest, ("audio", "question", "answer"))
    encoder = describe_encoder(model.model.requires_grad_(False), processor, "float32")
    cache = FeatureCache(arguments.output / "features", encoder, model.config.audio_config.d_model, 1e10)
    collator = DCTCollator(processor, lengths, 0, cache=cache)
    losses = []
    for length in lengths:
        at = rows.at(length)
        nats = tokens = 0.0
        with torch.inference_mode():
            for start in range(0, len(at), BATCH):
                batch = collator([at[number] for number in range(start, min(start + BATCH, len(at)))])
                count = int((batch["labels"] != -100).sum())
                nats += float(model(**cache.complete(model.model, batch)).loss) * count
                tokens += count
        cache.flush()
        losses.append((length, nats / tokens))
    return losses


if __name__ == "__main__":
    main()
