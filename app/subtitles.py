"""Transcripts as files: plain text, JSON, SubRip (srt) and WebVTT (vtt)."""

import json
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .words import Word

# What one reads at a time: two lines of 42 characters, 7 seconds at most, as guides for subtitles ask.
LINE_CHARACTERS = 42
CUE_SECONDS = 7.0
SHOWN_SECONDS = 0.8  # so long a cue is shown at least, if the next one does not begin before
PAUSE_SECONDS = 0.6  # a pause as long as this ends a cue
SENTENCE_ENDS = (".", "?", "!", "…")


class Segment(NamedTuple):
    """What is said between two times of a recording, ``start`` and ``end`` in seconds."""

    start: float
    end: float
    text: str


def segments(words: Sequence[Word]) -> list[Segment]:
    """Returns words as segments short enough to read as subtitles; they end at pauses and at the ends of sentences.

    A word alone may be longer than two lines, and is then a segment; one that lasts too long loses its end.
    """
    groups: list[list[Word]] = []
    for word in words:
        if groups and not _ends(groups[-1], word):
            groups[-1].append(word)
        else:
            groups.append([word])
    return [
        Segment(
            group[0].start, min(group[-1].end, group[0].start + CUE_SECONDS), " ".join(word.text for word in group)
        )
        for group in groups
    ]


def as_srt(cues: Iterable[Segment | Word]) -> str:
    """Returns segments or words as SubRip, which players read beside a film."""
    blocks = [
        f"{number}\n{timestamp(cue.start, ',')} --> {timestamp(cue.end, ',')}\n{cue.text}\n"
        for number, cue in enumerate(_shown(cues), 1)
    ]
    return "\n".join(blocks)


def as_vtt(cues: Iterable[Segment | Word]) -> str:
    """Returns segments or words as WebVTT, which browsers read."""
    escaped = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    blocks = [
        f"{timestamp(cue.start)} --> {timestamp(cue.end)}\n{cue.text.translate(escaped)}\n" for cue in _shown(cues)
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def as_json(result: dict[str, Any]) -> str:
    """Returns a result as one line of JSON in which times have milliseconds."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: rounded(inner) for name, inner in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            return rounded(value._asdict())
        if isinstance(value, (list, tuple)):
            return [rounded(inner) for inner in value]
        return round(value, 3) if isinstance(value, float) else value

    return json.dumps(rounded(result), ensure_ascii=False) + "\n"


def timestamp(seconds: float, point: str = ".") -> str:
    """Returns seconds as `01:02:03.456`, with another decimal point for SubRip."""
    milliseconds = round(seconds * 1000)
    minutes, hours = milliseconds // 60_000 % 60, milliseconds // 3_600_000
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000 % 60:02}{point}{milliseconds % 1000:03}"


def clock(seconds: float) -> str:
    """Returns whole seconds as people write them: `12:31`, or `1:02:03` from one hour on."""
    whole = int(seconds)
    minutes = f"{whole // 60 % 60}:{whole % 60:02}"
    return minutes if whole < 3600 else f"{whole // 3600}:{minutes.zfill(5)}"


def _ends(group: list[Word], word: Word) -> bool:
    """Tells whether a segment ends before a word."""
    return (
        _two_lines(" ".join(one.text for one in (*group, word))) is None
        or word.end - group[0].start > CUE_SECONDS
        or word.start - group[-1].end >= PAUSE_SECONDS
        or group[-1].text.endswith(SENTENCE_ENDS)
    )


def _shown(cues: Iterable[Segment | Word]) -> list[Segment]:
    """Returns cues in lines, each for as long as one needs to read it or until the next one begins."""
    parts = [part for cue in cues for part in _parts(cue)]
    nexts = [part.start for part in parts] + [float("inf")]
    return [
        part._replace(end=min(max(part.end, part.start + SHOWN_SECONDS), part.start + CUE_SECONDS, following))
        for part, following in zip(parts, nexts[1:], strict=True)
    ]


def _parts(cue: Segment | Word) -> list[Segment]:
    """Returns a cue in lines; where two of them can't hold it, as several cues that share its time evenly."""
    lines = _two_lines(cue.text) or textwrap.wrap(cue.text, LINE_CHARACTERS, break_on_hyphens=False)
    texts = ["\n".join(lines[first : first + 2]) for first in range(0, len(lines), 2)]
    each = (cue.end - cue.start) / len(texts)
    return [Segment(cue.start + each * n, cue.start + each * (n + 1), text) for n, text in enumerate(texts)]


def _two_lines(text: str) -> list[str] | None:
    """Returns a text in one line, or in two, cut at the space nearest to its middle; None if they can't hold it."""
    if len(text) <= LINE_CHARACTERS:
        return [text]
    after = len(text) - LINE_CHARACTERS - 1  # the first place of a space that leaves a second line short enough
    spaces = [place for place in range(max(0, after), LINE_CHARACTERS + 1) if text[place] == " "]
    if not spaces:
        return None
    middle = min(spaces, key=lambda place: abs(place - len(text) // 2))
    return [text[:middle], text[middle + 1 :]]


__all__ = ["Segment", "as_json", "as_srt", "as_vtt", "clock", "segments", "timestamp"]
