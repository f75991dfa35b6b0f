"""Words with the seconds at which they are said: those that the CTC decoder hears, and any text laid along them."""

from difflib import SequenceMatcher
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .. import EncodedRecordings

WORD_STARTS = ("▁", "Ġ")  # how SentencePiece and byte-level tokenizers mark the first piece of a word
ALIKE = 0.5  # share of letters from which two words may be the same one, misspelt by the CTC decoder
GAP = 0.45  # cost of a word that only one side has; two of these cost more than a pair that is just alike
SHORTEST = 0.02  # seconds of a word, half a frame: one between two that are heard in adjacent frames has time, too


class Word(NamedTuple):
    """A word's ``text``, and the ``start`` and ``end`` in seconds of its recording."""

    text: str
    start: float
    end: float


def ctc_words(
    model: Any,
    processor: Any,
    encoded: "EncodedRecordings",
) -> list[list[Word]]:
    """Returns the words that the CTC decoder hears in each recording, from the first frame of each word to its last.

    Args:
        model, processor: a model whose CTC decoder is trained, and its processor.
        encoded: as `model.encode` returns them.

    Raises:
        ValueError: the CTC decoder is not trained.
    """
    pieces, words, first = model.ctc_pieces(encoded), [], 0
    for length in encoded.lengths.tolist():
        of_one, runs = pieces[first : first + length].unique_consecutive(return_counts=True)
        stops = first + runs.cumsum(0)
        groups: list[tuple[list[int], float, float]] = []
        kept = of_one != model.config.ctc_blank
        for piece, start, stop in zip(*(x[kept].tolist() for x in (of_one, stops - runs, stops)), strict=True):
            begin, end = float(encoded.starts[start]), float(encoded.ends[stop - 1])
            if groups and not _starts_word(processor, piece):
                groups[-1] = ([*groups[-1][0], piece], groups[-1][1], end)
            else:
                groups.append(([piece], begin, end))
        texts = processor.ctc_decode([ids for ids, _, _ in groups])
        timed = [Word(text.strip(), *times) for text, (_, *times) in zip(texts, groups, strict=True)]
        words.append([word for word in timed if word.text])
        first += length
    return words


def lay_along(text: str, heard: list[Word], start: float, end: float) -> tuple[list[Word], list[bool]]:
    """Returns the words of a text with the times of the heard words that they match, and which heard words they match.

    Words are paired in order, so that as many letters as possible agree. The words of the text between two that are
    paired share the time between these evenly. Every word has some time, and no two overlap.

    Args:
        text: such as a transcript by the language model.
        heard: the words that the CTC decoder hears in the same stretch.
        start, end: seconds between which all of it lies.
    """
    texts = text.split()
    pairs = _pair([plain(word) for word in texts], [plain(word.text) for word in heard])
    times: list[tuple[float, float] | None] = [None] * len(texts)
    matched = [False] * len(heard)
    for here, there in pairs:
        times[here] = heard[there].start, heard[there].end
        matched[there] = True
    words: list[Word] = []
    for number, word in enumerate(texts):
        known = times[number]
        if known is None:
            later = next((n for n in range(number, len(texts)) if times[n] is not None), len(texts))
            until = end if later == len(texts) else times[later][0]  # type: ignore[index]
            since = words[-1].end if words else start
            known = since, since + max(0.0, until - since) / (later - number)
            if later == len(texts) and heard:  # what follows the last pair is not stretched over a pause
                known = since, min(known[1], since + 0.3)
        words.append(Word(word, *known))
    return _with_time(words, start, end), matched


def _with_time(words: list[Word], start: float, end: float) -> list[Word]:
    """Returns words of which each lasts at least `SHORTEST`, moved as little as that takes; all lie in the stretch."""
    if not words:
        return []
    shortest = min(SHORTEST, (end - start) / len(words))
    starts, earliest = [], start
    for word in words:
        starts.append(max(word.start, earliest))
        earliest = starts[-1] + shortest
    latest = end
    for number in reversed(range(len(words))):
        starts[number] = latest = min(starts[number], latest - shortest)
    latest_ends = [*starts[1:], end]
    return [
        Word(word.text, begin, min(max(word.end, begin + shortest), latest))
        for word, begin, latest in zip(words, starts, latest_ends, strict=True)
    ]


def _pair(texts: list[str], heard: list[str]) -> list[tuple[int, int]]:
    """Returns which word of a text is which word heard: the cheapest path through both (Needleman and Wunsch)."""
    costs = [[column * GAP for column in range(len(heard) + 1)]]
    for row, text in enumerate(texts, 1):
        line = [row * GAP]
        for column, word in enumerate(heard, 1):
            pair = costs[-1][column - 1] + unlike(text, word)
            line.append(min(pair, costs[-1][column] + GAP, line[-1] + GAP))
        costs.append(line)
    pairs, row, column = [], len(texts), len(heard)
    while row and column:
        cost = costs[row][column]
        if cost == costs[row - 1][column - 1] + unlike(texts[row - 1], heard[column - 1]):
            row, column = row - 1, column - 1
            if unlike(texts[row], heard[column]) <= 1 - ALIKE:
                pairs.append((row, column))
        elif cost == costs[row - 1][column] + GAP:
            row -= 1
        else:
            column -= 1
    return pairs[::-1]


@lru_cache(maxsize=100_000)
def unlike(text: str, word: str) -> float:
    """Returns the share of letters in which two words differ, 0 to 1; more where they can't be the same word."""
    if text == word:
        return 0.0
    matcher = SequenceMatcher(None, text, word, autojunk=False)
    if matcher.quick_ratio() < ALIKE or matcher.ratio() < ALIKE:
        return 1.0
    return 1 - matcher.ratio()


def plain(word: str) -> str:
    """Returns a word's letters and digits in lower case, as words are compared."""
    return "".join(letter for letter in word.lower() if letter.isalnum())


def _starts_word(processor: Any, piece: int) -> bool:
    if processor.ctc_tokenizer is not None:
        return processor.ctc_tokenizer.id_to_piece(piece).startswith(WORD_STARTS)
    return processor.tokenizer.convert_ids_to_tokens(piece).startswith(WORD_STARTS)


__all__ = ["Word", "ctc_words", "lay_along", "plain", "unlike"]
