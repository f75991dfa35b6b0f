"""Transcripts as files: plain text, JSON, SubRip (srt) and WebVTT (vtt)."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .words import Word

# What one reads at a time: two lines of 42 characters, 7 seconds at most, as guides for subtitles ask.
LINE_CHARACTERS = 42
CUE_CHARACTERS = 2 * LINE_CHARACTERS
CUE_SECONDS = 7.0
PAUSE_SECONDS = 0.6  # a pause as long as this ends a cue
SENTENCE_ENDS = (".", "?", "!", "…")


class Segment(NamedTuple):
    """What is said between two times of a recording, ``start`` and ``end`` in seconds."""

    start: float
    end: float
    text: str


def segments(words: Sequence[Word]) -> list[Segment]:
    """Returns words as segments short enough to read as subtitles; they end at pauses and at the ends of sentences."""
    groups: list[list[Word]] = []
    for word in words:
        if groups and not _ends(groups[-1], word):
            groups[-1].append(word)
        else:
            groups.append([word])
    return [Segment(group[0].start, group[-1].end, " ".join(word.text for word in group)) for group in groups]


def as_srt(cues: Iterable[Segment | Word]) -> str:
    """Returns segments or words as SubRip, which players read beside a film."""
    blocks = [
        f"{number}\n{timestamp(cue.start, ',')} --> {timestamp(cue.end, ',')}\n{_lines(cue.text)}\n"
        for number, cue in enumerate(cues, 1)
    ]
    return "\n".join(blocks)


def as_vtt(cues: Iterable[Segment | Word]) -> str:
    """Returns segments or words as WebVTT, which browsers read."""
    escaped = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    blocks = [
        f"{timestamp(cue.start)} --> {timestamp(cue.end)}\n{_lines(cue.text).translate(escaped)}\n" for cue in cues
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
    characters = sum(len(earlier.text) + 1 for earlier in group) + len(word.text)
    return (
        characters > CUE_CHARACTERS
        or word.end - group[0].start > CUE_SECONDS
        or word.start - group[-1].end >= PAUSE_SECONDS
        or group[-1].text.endswith(SENTENCE_ENDS)
    )


def _lines(text: str) -> str:
    """Returns a cue's text in two lines where it is long for one; cut at the space nearest to its middle."""
    if len(text) <= LINE_CHARACTERS or " " not in text:
        return text
    spaces = [place for place, letter in enumerate(text) if letter == " "]
    middle = min(spaces, key=lambda place: abs(place - len(text) // 2))
    return f"{text[:middle]}\n{text[middle + 1 :]}"


__all__ = ["Segment", "as_json", "as_srt", "as_vtt", "clock", "segments", "timestamp"]
