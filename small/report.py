"""The page of what the small model reaches: three tables from the scored predictions of `evaluate.py`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..app.markdown import insert_blocks, table
from ..evaluation.journal import read_journal
from ..evaluation.report import PREDICTIONS
from ..evaluation.scoring import exact_match, mean_with_interval
from .tasks import NOT_SAID

WRITER = "small/report.py"
DASH = "–"  # for what is not there yet
HEAD = "# What the small model hears\n"
HUMAN = ("librispeech", "librispeech-26", "ljspeech", "hifitts")  # native readers, the first measure of all
SHORT = ("ljspeech",)  # of these no clip takes 10 s, as those do whose transcripts by the language model are scored
TRUE = "true_transcript"

Rows = list[dict[str, Any]]


def read_scores(output: Path) -> dict[str, dict[str, Rows]]:
    """Returns the scored predictions in an output folder, by set and by condition (the names of its folders)."""
    found: dict[str, dict[str, Rows]] = {}
    for summary in sorted(output.glob("*/*/summary.json")):
        rows = list(read_journal(summary.parent / PREDICTIONS))
        found.setdefault(summary.parent.parent.name, {})[summary.parent.name] = rows
    return found


def percent(interval: Mapping[str, float]) -> str:
    """Returns a share with its 95 % interval in percent, for a table."""
    return f"{100 * interval['value']:.1f} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def mean(rows: Rows | None, metric: str) -> str:
    """Returns the mean of a score with its interval, for a table."""
    return percent(mean_with_interval([r[metric] for r in rows], [r["recording"] for r in rows])) if rows else DASH


def word_error_rate(rows: Rows | None) -> str:
    """Returns a word error rate with its interval, for a table."""
    spoken = [row for row in rows or [] if row["words"]]
    if not spoken:
        return DASH
    errors, words = [row["word_errors"] for row in spoken], [row["words"] for row in spoken]
    return percent(mean_with_interval(errors, [row["recording"] for row in spoken], words))


def ratio(rows: Rows | None, others: Rows | None, metric: str) -> str:
    """Returns the sum of a score over that of others on the same questions, with its interval, for a table."""
    base = {row["row"]: row[metric] for row in others or []}
    both = [row for row in rows or [] if row["row"] in base]
    weights = [base[row["row"]] for row in both]
    if not sum(weights):
        return DASH
    return percent(mean_with_interval([row[metric] for row in both], [row["recording"] for row in both], weights))


def transcripts(scores: dict[str, dict[str, Rows]], titles: Mapping[str, str]) -> str:
    """Returns the table of word error rates."""
    scores = dict(scores)
    # Rows are numbered within a set: told apart by it, they can be counted together.
    scores["human"] = {}
    for method, names in (("ctc", HUMAN), ("iterative_fusion-400", [name for name in HUMAN if name not in SHORT])):
        if all(method in scores.get(name, {}) for name in names):
            rows = [row | {"row": (name, row["row"])} for name in names for row in scores[name][method]]
            scores["human"][method] = rows
    lines = []
    for name, title in [*titles.items(), ("human", "all four native sets")]:
        ctc, written = scores.get(name, {}).get("ctc"), scores.get(name, {}).get("iterative_fusion-400")
        same = {row["row"] for row in written or []}
        lines.append(
            [
                title,
                len(ctc) if ctc else DASH,
                word_error_rate(ctc),
                len(written) if written else DASH,
                word_error_rate([row for row in ctc or [] if row["row"] in same]),
                word_error_rate(written),
                ratio(written, ctc, "word_errors"),
            ]
        )
    headings = ["recordings", "clips", "CTC decoder", "of 10 to 30 s", "CTC decoder", "language model, L = 400"]
    return table([*headings, "its share of the CTC decoder's"], lines)


def questions(scores: dict[str, dict[str, Rows]], titles: Mapping[str, str], lengths: Sequence[int]) -> str:
    """Returns the table of answers to questions, each method beside the true transcript read by the same model."""
    names = {
        TRUE: "reads the true transcript",
        "ctc_cascade": "reads the CTC decoder's transcript",
        "none": "hears, every frame",
    }
    names |= {f"iterative_fusion-{length}": f"hears, L = {length}" for length in lengths}
    lines = []
    for method, title in names.items():
        line = [title]
        for name in titles:
            rows, read = scores.get(name, {}).get(method), scores.get(name, {}).get(TRUE)
            line += [mean(rows, "token_f1"), ratio(rows, read, "token_f1")]
        lines.append(line)
    headings = ["the language model"]
    for name, title in titles.items():
        count = len(next(iter(scores.get(name, {}).values()), []))
        headings += [f"{title} ({count} questions)", "share of the true transcript's"]
    return table(headings, lines)


def others(scores: dict[str, dict[str, Rows]]) -> str:
    """Returns the table of what is said about the voice, and of what is not said."""
    unsaid = scores.get("not-said", {}).get("iterative_fusion-400")
    voice = scores.get("voices", {}).get("iterative_fusion-400")
    said = scores.get("passages", {}).get("iterative_fusion-400")
    found = [row | {"found": not exact_match(row["prediction"], [NOT_SAID])} for row in said or []]
    lines = [
        [
            'a question that the passage does not answer: "It is not said."',
            len(unsaid or []),
            mean(unsaid, "exact_match"),
        ],
        ["a question that the passage answers: any other answer", len(found), mean(found, "found")],
        ["man or woman", len(voice or []), mean(voice, "accuracy")],
    ]
    return table(["asked, at L = 400", "questions", "right, %"], lines)


def write_page(page: Path, output: Path, titles: Mapping[str, tuple[str, str]], lengths: Sequence[int]) -> None:
    """Writes the tables into their blocks of a page; all other text on it stays.

    Args:
        page: the Markdown file.
        output: folder of the scored predictions.
        titles: title and task of every set, by name.
        lengths: L of the rows of the table of questions.
    """
    scores = read_scores(output)
    heard = {name: title for name, (title, task) in titles.items() if task == "asr"}
    asked = {name: titles[name][0] for name in ("passages", "people")}
    summaries = sorted(output.glob("*/*/summary.json"))
    run = json.loads(summaries[0].read_text(encoding="utf-8")) if summaries else {"versions": {}, "run": {}}
    facts = ", ".join(
        f"{name} {version}" for name, version in run["versions"].items() if name in ("torch", "transformers")
    )
    blocks = {
        "transcripts": f"Word errors in percent.\n\n{transcripts(scores, heard)}",
        "questions": f"Token F1 in percent.\n\n{questions(scores, asked, lengths)}",
        "others": others(scores),
        "versions": f"Run with {facts} on {run['run'].get('device', 'no device')}, {run['run'].get('dtype', '')}.",
    }
    text = page.read_text(encoding="utf-8") if page.exists() else HEAD
    page.write_text(insert_blocks(text, blocks, str(page), WRITER), encoding="utf-8")


__all__ = ["read_scores", "write_page"]
