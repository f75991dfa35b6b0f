"""The results of a recipe's conditions: scores with their intervals, counted operations, measured seconds."""

import json
from collections import Counter
from typing import Any

from tqdm import tqdm

from ...app.cost import ModelCost
from ...app.sizes import read_config
from ..journal import read_journal
from ..report import PREDICTIONS
from ..run import SUMMARY
from ..scoring import mean_with_interval
from .recipe import BASELINE, NTK_ROPE, OURS, WINDOW, Condition, Method, Recipe

SECONDS = "seconds.jsonl"
Rows = list[dict[str, Any]]
DASH = "–"  # for what is not there yet
# A benchmark is scored by the first of these that all its predictions have: the name of the score, and its factor.
METRICS = {
    "judge": ("score, 1 to 5", 1),
    "exact_match": ("exact match, %", 100),
    "accuracy": ("accuracy, %", 100),
    "word_errors": ("word errors, %", 100),
    "token_f1": ("token F1, %", 100),
}


class Results:
    """The scored predictions of a recipe's conditions, as far as they are there, and what they cost.

    Attributes:
        found: the predictions of every condition that is complete.
        summaries: what is in their `summary.json`.
        missing: the other conditions.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.found: dict[Condition, Rows] = {}
        self.summaries: dict[Condition, dict[str, Any]] = {}
        for condition in recipe.conditions():
            folder = recipe.folder(condition)
            if (folder / SUMMARY).exists():
                self.found[condition] = read_journal(folder / PREDICTIONS)
                self.summaries[condition] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        self.missing = [condition for condition in recipe.conditions() if condition not in self.found]
        self.counter = ModelCost(read_config(recipe.models[OURS.model]))
        self._flops: dict[tuple[int, int | None, str], int] = {}

    def rows(self, benchmark: str, method: Method, length: int = WINDOW) -> Rows | None:
        """Returns the predictions of a condition; None: not there, or the recipe does not compare this method."""
        if not self.recipe.compared([method]):
            return None
        return self.found.get(self.recipe.condition(benchmark, method, length))

    def title(self, benchmark: str) -> str:
        """Returns what a benchmark is called on the page."""
        return self.recipe.benchmarks[benchmark].get("title", benchmark)

    def unit(self, benchmark: str) -> tuple[str, float]:
        """Returns the unit that the operations of a benchmark are shown in: its name and size."""
        return ("TFLOPs", 1e12) if (self.flops(benchmark, BASELINE) or 0) > 1e11 else ("GFLOPs", 1e9)

    def benchmarks(self, long: bool, *metrics: str) -> list[str]:
        """Returns the benchmarks of long or of short recordings that are scored by one of these metrics, or by any."""
        names = [name for name in self.recipe.benchmarks if self.recipe.is_long(name) == long]
        return [name for name in names if not metrics or self.metric(name) in metrics]

    def metric(self, benchmark: str) -> str:
        """Returns what a benchmark is scored by."""
        found = [rows for condition, rows in self.found.items() if condition.benchmark == benchmark]
        for name in METRICS:
            if found and all(any(row.get(name) is not None for row in rows) for rows in found):
                return name
        task = self.recipe.benchmarks[benchmark]["task"]
        return {"asr": "word_errors", "choice": "accuracy", "meld": "accuracy"}.get(task, "exact_match")

    def flops(self, benchmark: str, method: Method, length: int = WINDOW) -> float | None:
        """Returns the operations to the first token of an answer, counted by `app/cost.py`: their mean.

        Durations are rounded to seconds. None where no condition of the benchmark is there.
        """
        condition = self.recipe.condition(benchmark, method, length)
        target, compression = condition.length, condition.compression
        if method == NTK_ROPE:
            target, compression = self.longest(benchmark, method), "iterative_fusion"
            if target is None:
                return None
        same = [rows for other, rows in self.found.items() if other.benchmark == benchmark]
        if not same:
            return None
        durations = Counter(max(1, round(row["duration"])) for row in same[0])
        cases = [(duration, target, compression) for duration in durations]
        waiting = [case for case in cases if case not in self._flops]
        for case in tqdm(waiting, desc="counting operations", leave=False, delay=1):
            self._flops[case] = self.counter.recording(*case).total
        return sum(self._flops[duration, target, compression] * n for duration, n in durations.items()) / sum(
            durations.values()
        )

    def longest(self, benchmark: str, method: Method) -> int | None:
        """Returns the most frames a method was given of a recording; None: the condition is not there."""
        summary = self.summaries.get(self.recipe.condition(benchmark, method))
        return None if summary is None else summary["run"]["target_length"]

    def seconds(self, benchmark: str, method: Method) -> Rows:
        """Returns the measured seconds of a method, a row for each recording."""
        condition = self.recipe.condition(benchmark, method)
        rows = read_journal(self.recipe.output / benchmark / SECONDS)
        return [row for row in rows if (row["model"], row["compression"]) == (condition.model, condition.compression)]


def mean_of(rows: Rows | None, metric: str) -> dict[str, float] | None:
    """Returns the mean of a metric in its unit as `value`, with `low` and `high`; None where nothing is scored."""
    rows = [row for row in rows or [] if row.get(metric) is not None and row.get("words") != 0]
    if not rows:
        return None
    weights = [row["words"] for row in rows] if metric == "word_errors" else None
    interval = mean_with_interval([row[metric] for row in rows], [row["recording"] for row in rows], weights)
    return {name: value * METRICS[metric][1] for name, value in interval.items()}


def cell(rows: Rows | None, metric: str, sign: str = "") -> str:
    """Returns a mean and its 95 % interval for a table."""
    interval = mean_of(rows, metric)
    if interval is None:
        return DASH
    form = f"{sign}.{2 if METRICS[metric][1] == 1 else 1}f"
    return f"{interval['value']:{form}} [{interval['low']:{form}}, {interval['high']:{form}}]"


def difference(rows: Rows | None, others: Rows | None, metric: str) -> str:
    """Returns by how much `rows` differ from `others` on the same questions, with its interval, for a table."""
    scores = {row["row"]: row.get(metric) for row in others or []}
    pairs = [(row, scores.get(row["row"])) for row in rows or []]
    both = [row | {metric: row[metric] - other} for row, other in pairs if None not in (row.get(metric), other)]
    return cell(both, metric, "+")
