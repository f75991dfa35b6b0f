"""Several sources as one, each with a share of the samples: a YAML file that names them.

    librispeech-train.jsonl: 1        # path, relative to this file: weight
    mls-train.jsonl: 3

Without weights, every row comes once in an epoch. With them, an epoch has as many samples as there are rows in all,
and a source gives its share: of a small source with a large weight every row comes several times, of a large one
with a small weight a part, the next part in the next epoch. All rows of a source are taken before one comes again.
The order depends on the seed and the epoch alone, so that a resumed run goes on in it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .manifests import SpeechRows, load_rows
from .streams import PREFIX, open_stream


class Mixture:
    """How many rows of every source an epoch has, and which.

    Args:
        sizes: rows of every source; they are numbered through.
        weights: of every source.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float]):
        self.sizes = list(sizes)
        shares = np.asarray(weights, dtype=np.float64) / sum(weights) * sum(sizes)
        self.counts = np.floor(shares).astype(int)
        largest = np.argsort(self.counts - shares, kind="stable")[: sum(sizes) - int(self.counts.sum())]
        self.counts[largest] += 1

    def rows_of(self, seed: int, epoch: int) -> np.ndarray:
        """Returns the row numbers of an epoch, source after source."""
        firsts = [0, *accumulate(self.sizes)]
        parts = []
        for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            rounds, places = np.divmod(np.arange(epoch * count, (epoch + 1) * count), size)
            for number in np.unique(rounds):
                order = np.random.default_rng((seed, source, int(number))).permutation(size)
                parts.append(firsts[source] + order[places[rounds == number]])
        return np.concatenate(parts)


class MixedRows(Dataset):
    """The rows of several sources, numbered through: as `SpeechRows`, and the `mixture` that `StepSampler` follows."""

    def __init__(self, parts: Sequence[SpeechRows], names: Sequence[str], mixture: Mixture):
        self.parts, self.names, self.mixture = list(parts), list(names), mixture
        self.durations = [seconds for part in parts for seconds in part.durations]
        self.places = [f"{name}, {place}" for name, part in zip(names, parts, strict=True) for place in part.places]
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        step, index = key if isinstance(key, tuple) else (None, key)
        part = bisect_right(self.ends, index)
        number = index - (self.ends[part - 1] if part else 0)
        return self.parts[part][number if step is None else (step, number)]

    def at(self, target_length: int) -> MixedRows:
        """Returns the same rows, all to be fused to `target_length` frames."""
        return MixedRows([part.at(target_length) for part in self.parts], self.names, self.mixture)

    def texts(self, column: str) -> list[str]:
        """Returns one column of all rows, without touching their audio."""
        return [text for part in self.parts for text in part.texts(column)]


def load_training_rows(source: str, columns: Sequence[str]) -> Any:
    """Returns the rows of a source, of all that a YAML file names with their weights, or of a stream.

    Raises:
        FileNotFoundError: there is nothing at `source`, or at one that it names.
        ValueError: a row is not usable, or a weight is no positive number.
    """
    if source.startswith(PREFIX):
        return open_stream(source, columns)
    if not source.endswith((".yaml", ".yml")):
        return load_rows(source, columns)
    weights = read_mixture(source)
    parts = [load_rows(name, columns) for name in weights]
    sizes = [len(part) for part in parts]
    shares = [size if weight is None else weight for size, weight in zip(sizes, weights.values(), strict=True)]
    return MixedRows(parts, list(weights), Mixture(sizes, shares))


def read_mixture(path: str) -> dict[str, float | None]:
    """Returns the weights of the sources that a YAML file names, their paths made whole; None where it has no weights.

    Raises:
        ValueError: it names none, a weight is no positive number, or only some have one.
    """
    import yaml

    found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} names no sources; write lines of `manifest.jsonl: weight`.")
    if all(weight is None for weight in found.values()):
        return dict.fromkeys(str(Path(path).parent / str(name)) for name in found)
    for name, weight in found.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(
                f"{path} gives {name} the weight {weight!r}; it must be a positive number; give all one, or none."
            )
    return {str(Path(path).parent / str(name)): float(weight) for name, weight in found.items()}
