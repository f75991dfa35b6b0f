"""The predictions of a benchmark: read, scored, and summed up."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.tasks import LONGSPEECH, QuestionSet
from . import longspeech
from .journal import read_journal
from .scoring import (
    exact_match,
    find_choice,
    macro_f1,
    mean_with_interval,
    token_f1,
    whisper_normalizer,
    word_errors,
)

PREDICTIONS = "predictions.jsonl"


def read_predictions(output: Path, benchmark: QuestionSet) -> list[dict[str, Any]]:
    """Returns the predictions in an output folder, those of all processes and runs, in the order of the benchmark.

    Raises:
        ValueError: a prediction is about another question than the benchmark's row of that number.
    """
    found: dict[int, dict[str, Any]] = {}
    for path in [output / PREDICTIONS, *sorted(output.glob("predictions.part*.jsonl"))]:
        found |= {row["row"]: row for row in read_journal(path)}
    for example in benchmark.examples:
        row = found.get(example.row)
        if row is not None and (row["question"], row["answers"]) != (example.question, example.answers):
            raise ValueError(
                f"row {example.row} of the data is not what --output {output} has a prediction of; name another."
            )
    return [found[example.row] for example in benchmark.examples if example.row in found]


def save_predictions(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes all predictions into one file, in place of those of the processes."""
    whole = output / "predictions.new"
    whole.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    whole.replace(output / PREDICTIONS)
    for part in output.glob("predictions.part*.jsonl"):
        part.unlink()


def score_predictions(rows: Sequence[dict[str, Any]], metric: str, spellings: str | Path | None = None) -> None:
    """Adds its scores to every prediction.

    An answer gets `exact_match` and `token_f1`; a choice gets `chosen` (None: no choice, or several) and `accuracy`; a
    transcript gets `word_errors` and `words`. A reference without words (noise) counts nowhere. A task of LongSpeech
    has scores of its own.
    """
    normalize = whisper_normalizer(spellings)
    for row in rows:
        prediction, answers = row["prediction"], row["answers"]
        if metric in LONGSPEECH:
            row |= longspeech.score_prediction(metric, row, normalize)
        elif metric == "answer":
            row["exact_match"] = float(exact_match(prediction, answers))
            row["token_f1"] = token_f1(prediction, answers)
        elif metric == "choice":
            row["chosen"] = find_choice(prediction, row["choices"])
            row["accuracy"] = float(row["chosen"] in answers)
        else:
            reference = normalize(answers[0]).strip()
            row["word_errors"], row["words"] = word_errors(reference, normalize(prediction)) if reference else (0, 0)


def summarize(rows: Sequence[dict[str, Any]], benchmark: QuestionSet) -> dict[str, Any]:
    """Returns the figures of scored predictions, all together and, where they have several, for every `kind`."""
    metric = benchmark.metric
    recordings = {row["recording"]: row["duration"] for row in rows}
    summary: dict[str, Any] = {
        "questions": len(rows),
        "recordings": len(recordings),
        "hours": round(sum(recordings.values()) / 3600, 4),
        "rows_left_out": benchmark.left_out,
        "scores": _scores(rows, metric),
    }
    kinds = defaultdict(list)
    for row in rows:
        kinds[row.get("kind")].append(row)
    if len(kinds) > 1:
        summary["scores_by_kind"] = {
            str(kind): _scores(of_kind, metric) | {"questions": len(of_kind)} for kind, of_kind in kinds.items()
        }
    summary["stopped_by_max_new_tokens"] = sum(not row["ended"] for row in rows)
    if metric == "choice":
        summary["without_a_choice"] = sum(row["chosen"] is None for row in rows)
    if metric == "transcript":
        summary["references_without_words"] = sum(row["words"] == 0 for row in rows)
    if any("known" in row for row in rows):
        summary["references_not_understood"] = sum(not row["known"] for row in rows)
    if any("judge" in row for row in rows):
        summary["unparsable_verdicts"] = sum(row["judge"] is None for row in rows)
    return summary


def _scores(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    groups = [row["recording"] for row in rows]
    if metric == "transcript":
        spoken = [row for row in rows if row["words"]]
        errors, words = [row["word_errors"] for row in spoken], [row["words"] for row in spoken]
        groups = [row["recording"] for row in spoken]
        return {"word_error_rate": mean_with_interval(errors, groups, words)} if spoken else {}
    if metric in LONGSPEECH:
        return longspeech.figures(metric, rows)
    names = ["accuracy"] if metric == "choice" else ["exact_match", "token_f1"]
    scores = {name: mean_with_interval([row[name] for row in rows], groups) for name in names}
    if metric == "choice":
        scores["macro_f1"] = {"value": macro_f1([row["chosen"] for row in rows], [row["answers"][0] for row in rows])}
    judged = [row for row in rows if row.get("judge") is not None]
    if judged:
        scores["judge"] = mean_with_interval([row["judge"] for row in judged], [row["recording"] for row in judged])
    return scores
