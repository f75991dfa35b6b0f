"""The seconds of a recording that an answer leans on: where the CTC decoder hears the words of answer and question."""

from collections import Counter
from collections.abc import Sequence
from math import log
from typing import NamedTuple

from .words import Word, plain, unlike

STRETCH_SECONDS = 12.0  # about a sentence: words that belong together are no further apart
ANSWER_WEIGHT = 2.0  # a word of the answer counts as so many of the question
ALIKE = 0.76  # share of letters from which a heard word may be one that is looked for


class Place(NamedTuple):
    """A stretch of a recording: the ``recording``'s number, and ``start`` and ``end`` in seconds."""

    recording: int
    start: float
    end: float


def find_place(heard: Sequence[Sequence[Word]], question: str, answer: str) -> Place | None:
    """Returns the stretch that an answer leans on, from the first word looked for to the last; None if none is there.

    Every word of answer and question counts the more, the rarer the recordings say it (as in retrieval of texts), and
    the more of its letters the CTC decoder has heard. The stretch whose words count most is taken.

    Args:
        heard: the words that the CTC decoder hears in each recording, see `ctc_words`.
        question, answer: texts.
    """
    spoken = [(number, word) for number, words in enumerate(heard) for word in words]
    often = Counter(plain(word.text) for _, word in spoken)
    wanted = dict.fromkeys(map(plain, question.split()), 1.0)
    wanted |= dict.fromkeys(map(plain, answer.split()), ANSWER_WEIGHT)
    # For every word looked for: what each heard word that may be it counts.
    counts: dict[str, list[tuple[str, float]]] = {}
    for text in filter(None, wanted):
        alike = {word: 1 - unlike(text, word) for word in often if word}
        alike = {word: share for word, share in alike.items() if share >= ALIKE}
        rare = log(len(spoken) / sum(often[word] for word in alike)) if alike else 0.0
        for word, share in alike.items():
            counts.setdefault(word, []).append((text, wanted[text] * rare * share**2))
    found = [(number, word, counts[plain(word.text)]) for number, word in spoken if plain(word.text) in counts]
    best, place = 0.0, None
    for first, (number, begin, _) in enumerate(found):
        within: dict[str, float] = {}
        end = begin.end
        for other, later, of_word in found[first:]:
            if other != number or later.end - begin.start > STRETCH_SECONDS:
                break
            for text, count in of_word:
                if count > within.get(text, 0.0):
                    within[text], end = count, later.end
        total = round(sum(within.values()), 6)
        if total > 0 and total >= best:  # of equal stretches the one that begins last: it is no longer than needed
            best, place = total, Place(number, begin.start, end)
    return place


__all__ = ["Place", "find_place"]
