"""Compares ways to draw the length L in stage 2, each trained for the same steps on the same clips of the demo model.

    python -m fastlongspeech.demo.corpus work/corpus --splits train dev --recordings 400
    python -m fastlongspeech.demo.corpus work/corpus --splits dev-long --recordings 20
    python -m fastlongspeech.train.compare_lengths work/corpus work/lengths

The paper draws one L for a batch, uniformly. The others: one L for each recording; weights that grow, or fall, with
the length; and a schedule that starts with the greatest lengths and takes in a shorter one at a time, until all are
there in the middle of the run. Prints the losses on held-out questions at fixed lengths, and writes them to
`comparison.json` in the last folder. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import dct
from .batches import DCTCollator
from .cache import FeatureCache, describe_encoder

DEMO = Path(__file__).parents[1] / "checkpoints" / "fastlongspeech-demo"
STEPS, BATCH = 40, 8
CLIP_LENGTHS, LONG_LENGTHS = (200, 50, 12), (750,)


class PerRecording(DCTCollator):
    """Draws L for every recording of a batch, uniformly: a function of the seed, the step and the place of its row."""

    def draw_length(self, rows: list[dict[str, Any]]) -> list[int]:
        places = [(row["step"], int.from_bytes(str(row["audio"]).encode()[-8:], "little")) for row in rows]
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

    def weights(self, step: int) -> Sequence[float]:
        allowed = math.ceil(len(self.target_lengths) * min(1.0, 2 * (step + 1) / STEPS))
        return [float(place < allowed) for place in range(len(self.target_lengths))]


WAYS = {
    "uniform": DCTCollator,
    "per recording": PerRecording,
    "more long": MoreLong,
    "more short": MoreShort,
    "mild first": MildFirst,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder that fastlongspeech.demo.corpus made")
    parser.add_argument("output", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="one run of every way for each")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    evaluation = {"clips": ("dev", 96, CLIP_LENGTHS), "long": ("dev-long", 32, LONG_LENGTHS)}
    manifests = {kind: questions(arguments, kind, *rest[:2]) for kind, rest in evaluation.items()}
    training = questions(arguments, "train", "train")
    results: dict[str, list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        for way in WAYS:
            losses: dict[str, float] = {}
            folder = arguments.output / f"{way.replace(' ', '-')}-{seed}"
            if not (folder / "config.json").exists():
                train(arguments, folder, training, WAYS[way], seed)
            for kind, (_, _, lengths) in evaluation.items():
                losses |= {
                    f"{kind} {length}": loss for length, loss in measure(arguments, folder, manifests[kind], lengths)
                }
            results.setdefault(way, []).append(losses)
            (arguments.output / "comparison.json").write_text(json.dumps(results, indent=1))
    names = list(results["uniform"][0])
    print("| L is drawn | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for way, of_seeds in results.items():
        means = [np.mean([losses[name] for losses in of_seeds]) for name in names]
        print(f"| {way} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")


def questions(arguments: argparse.Namespace, kind: str, split: str, number: int | None = None) -> Path:
    """Writes a manifest of a split's questions about facts, so many of them or all, and returns its path."""
    folder = (arguments.corpus / split).resolve()
    rows = [json.loads(line) for line in (folder / "qa.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] not in ("voice", "transcription")]
    chosen = random.Random(0).sample(rows, number or len(rows))
    path = arguments.output / f"{kind}.jsonl"
    path.write_text("".join(json.dumps({**row, "audio": str(folder / row["audio"])}) + "\n" for row in chosen))
    return path


def train(arguments: argparse.Namespace, folder: Path, manifest: Path, collator: type[DCTCollator], seed: int) -> None:
    """Trains the demo model in one way."""
    settings = {
        "model": DEMO,
        "train_data": manifest,
        "output_dir": folder,
        "feature_cache": arguments.output / "features",
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
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
