"""Scores of answers, choices and transcripts, without any judge.

Answers are compared by SQuAD's rules (Rajpurkar et al., 2016), transcripts after Whisper's English normaliser
(Radford et al., 2023). Every figure comes with a 95 % bootstrap interval over recordings, whose questions are not
independent.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import jiwer
import numpy as np
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

RESAMPLES = 1000


def normalize_answer(text: str) -> str:
    """Returns a text in lower case without punctuation, articles and needless spaces, as SQuAD compares answers."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Tells whether a prediction is one of the answers after `normalize_answer`."""
    return normalize_answer(prediction) in map(normalize_answer, answers)


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns the F1 of the words that a prediction shares with the answer it shares most with, in [0, 1]."""
    return max(_f1(normalize_answer(prediction).split(), normalize_answer(answer).split()) for answer in answers)


def _f1(predicted: list[str], wanted: list[str]) -> float:
    if not predicted or not wanted:
        return float(predicted == wanted)
    shared = (Counter(predicted) & Counter(wanted)).total()
    return 2 * shared / (len(predicted) + len(wanted))


def find_choice(prediction: str, choices: Sequence[str]) -> str | None:
    """Returns the choice that a prediction names, or None where it names none, or several.

    The whole prediction, or the only choice that stands in it as a word; case and punctuation have no meaning. A
    choice that is a letter counts only where the prediction begins with it, as in "B. In Paris".
    """
    said = _words(prediction)
    named = []
    for choice in choices:
        words = _words(choice)
        if words == said:
            return choice
        size = len(words)
        starts = range(len(said) - size + 1) if len(choice) > 1 else range(min(1, len(said)))
        if any(said[start : start + size] == words for start in starts):
            named.append(choice)
    return named[0] if len(named) == 1 else None


def macro_f1(chosen: Sequence[str | None], answers: Sequence[str]) -> float:
    """Returns the F1 of every choice that is an answer or was chosen, averaged; None is a miss of the answer alone."""
    scores = []
    for choice in {*answers, *chosen} - {None}:
        hits = sum(one == other == choice for one, other in zip(chosen, answers, strict=True))
        scores.append(2 * hits / (sum(one == choice for one in chosen) + sum(one == choice for one in answers)))
    return sum(scores) / len(scores)


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def whisper_normalizer(spellings: str | Path | None = None) -> Callable[[str], str]:
    """Returns Whisper's normaliser of English transcripts.

    Args:
        spellings: Whisper's `normalizer.json`, which makes British spellings American; it comes with the checkpoints
            of Whisper on the Hub and not with transformers. Without, both spellings stay what they are.
    """
    return EnglishTextNormalizer({} if spellings is None else json.loads(Path(spellings).read_text(encoding="utf-8")))


def word_errors(reference: str, transcript: str) -> tuple[int, int]:
    """Returns the word errors of a transcript and the words of the reference, which must have some."""
    counts = jiwer.process_words(reference, transcript)
    return counts.substitutions + counts.deletions + counts.insertions, len(reference.split())


def mean_with_interval(
    values: Sequence[float], groups: Sequence[str], weights: Sequence[float] | None = None, seed: int = 0
) -> dict[str, float]:
    """Returns `sum(values) / sum(weights)` as `value`, with `low` and `high`, its 95 % bootstrap interval.

    Groups are drawn with replacement, `RESAMPLES` times; the interval goes from the 2.5th to the 97.5th percentile.
    The same arguments give the same interval.

    Args:
        values: figures, or the word errors of transcripts.
        groups: what each belongs to (its recording).
        weights: by default 1 each; for a word error rate the words of the references.
        seed: of the drawing.
    """
    index = np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.bincount(index, weights=np.asarray(values, dtype=float))
    totals = np.bincount(index, weights=None if weights is None else np.asarray(weights, dtype=float)).astype(float)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        picked = rng.integers(len(sums), size=len(sums))
        drawn.append(sums[picked].sum() / totals[picked].sum())
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": float(sums.sum() / totals.sum()), "low": float(low), "high": float(high)}
