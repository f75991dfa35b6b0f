"""Transcripts of recordings of any duration: cut at pauses, written window by window, checked, and accounted for.

    for window in transcribe(session, read_windows(session, samples)):
        print(window.text)

A language model stops half-way, repeats itself, or invents words, and does not say so. So each window that it writes
is laid along the words that the CTC decoder hears in it. Where they don't fit, the window is written again from every
frame, and then by the CTC decoder.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria

from ..prompts_fastlongspeech import TRANSCRIBE
from ..recordings_fastlongspeech import EncodedRecordings
from .session import Answer, Heard, Recording, Session
from .subtitles import clock
from .words import Word, ctc_words, lay_along

SECONDS = 30.0  # of a window, at most
PAUSE_DENSITY = 0.5  # a frame with less carries no text: blank is likelier than all pieces together
EARLIEST_CUT = 0.5  # of a window: no pause before it is taken
LEFT_OUT = 5  # so many heard words in a row without a counterpart are left out; fewer are heard or written wrongly
# What counts as a loop: the last tokens repeat a group of at most LOOP_TOKENS four times, and are at least 12.
LOOP_TOKENS, LOOP_TIMES, LOOP_SHORTEST = 40, 4, 12


@dataclass(frozen=True)
class Window:
    """A stretch of a recording between two pauses, and what is said in it.

    Attributes:
        start, end: seconds of the recording.
        text: empty where nothing is said, or nothing was found.
        words: the same with times; empty where the CTC decoder is not trained.
        by: what wrote it: `"language model"`, `"every frame"` (the language model again, without fusion), `"ctc"`,
            `"silence"` (the CTC decoder hears nothing, nobody was asked), or `"unfinished"` (the language model
            stopped at the limit of tokens or in a loop, and there is no CTC decoder to fall back on).
        missed: seconds in which the CTC decoder hears words that the text lacks.
    """

    start: float
    end: float
    text: str
    words: tuple[Word, ...]
    by: str
    missed: float = 0.0


@dataclass(frozen=True)
class Coverage:
    """How much of a recording its transcript covers.

    Attributes:
        seconds: of the recording.
        read: seconds that the encoder has read.
        answered: seconds of windows with text, less those in which heard words are missing from it.
        silent: seconds of windows in which nothing is said.
        empty: start and end, in seconds, of windows that gave nothing though something may be said in them.
        windows: how many windows each way of writing has written, see `Window.by`.
    """

    seconds: float
    read: float
    answered: float
    silent: float
    empty: tuple[tuple[float, float], ...]
    windows: dict[str, int]

    def __str__(self) -> str:
        parts = [f"read {self.read:.1f} of {self.seconds:.1f} s", f"answered {self.answered:.1f} s"]
        parts += [f"silence {self.silent:.1f} s"] if self.silent else []
        parts += ["windows by way: " + ", ".join(f"{way} {count}" for way, count in self.windows.items())]
        parts += ["nothing from " + ", ".join(f"{clock(a)}-{clock(b)}" for a, b in self.empty)] if self.empty else []
        return "; ".join(parts)


def find_pause(density: Tensor) -> int:
    """Returns the frame before which a window is cut: the middle of the longest pause in its second half.

    Without a frame that carries no text, as with a CTC decoder that is not trained, the window is not cut.

    Args:
        density: `(T,)`, the content density of the window's frames.
    """
    first = int(len(density) * EARLIEST_CUT)
    longest, cut, frame = 0, len(density), first
    for quiet, run in groupby((density[first:] < PAUSE_DENSITY).tolist()):
        length = sum(1 for _ in run)
        if quiet and length > longest:
            longest, cut = length, frame + (length + 1) // 2
        frame += length
    return cut


def read_windows(session: Session, samples: np.ndarray, start: float = 0.0) -> Iterator[EncodedRecordings]:
    """Yields a recording's windows as they are encoded, each to its last pause; the next one begins there.

    No word is cut, and no more than one window is held. Where a window's second half has no pause, it ends at 30 s.

    Args:
        session: whose encoder reads.
        samples: `(S,)` float32, 16 kHz, as `load_recording` returns them.
        start: seconds to begin at, where an earlier run stopped.
    """
    windows, rate = session.model.config.windows, session.processor.feature_extractor.sampling_rate
    first, longest = round(start * rate), round(SECONDS * rate)
    while windows.own(windows.mel_frames(len(samples) - first))[1].any():
        stop = first + longest
        encoded = session.listen({"array": samples[first:stop], "sampling_rate": rate}).encoded
        count = len(encoded.frames)
        cut = count if stop >= len(samples) else find_pause(session.model.density(encoded.frames))
        offset = first / rate
        moved = replace(encoded, starts=encoded.starts + offset, ends=encoded.ends + offset)
        yield _frames(moved, 0, cut)
        first = stop if cut == count else round(float(moved.ends[cut - 1]) * rate)


def cut_at_pauses(session: Session, encoded: EncodedRecordings) -> Iterator[EncodedRecordings]:
    """Yields windows of one recording that is encoded already, cut at pauses; the encoder has no part in it.

    The encoder has read windows of 30 s, and may have cut a word at each end of them.
    """
    density, first = session.model.density(encoded.frames).cpu(), 0
    while first < len(density):
        stop = int(torch.searchsorted(encoded.starts, encoded.starts[first] + SECONDS))
        stop = stop if stop == len(density) else first + find_pause(density[first:stop])
        yield _frames(encoded, first, stop)
        first = stop


def transcribe(
    session: Session,
    windows: Iterable[EncodedRecordings],
    target_length: int | None = None,
    by_ctc: bool = False,
) -> Iterator[Window]:
    """Yields what is said in windows of a recording, as it comes.

    Args:
        session: the model that writes.
        windows: what `read_windows` or `cut_at_pauses` yields.
        target_length: L, frames to fuse each window to; None: configured.
        by_ctc: whether the CTC decoder writes, and not the language model.

    Raises:
        ValueError: `by_ctc`, and the CTC decoder is not trained.
    """
    for window in windows:
        yield write_window(session, window, target_length, by_ctc)


def write_window(session: Session, encoded: EncodedRecordings, target_length: int | None, by_ctc: bool) -> Window:
    """Returns what is said in one window; see `transcribe`."""
    start, end = float(encoded.starts[0]), float(encoded.ends[-1])
    trained = session.model.config.ctc_trained
    heard = ctc_words(session.model, session.processor, encoded)[0] if trained or by_ctc else []
    spoken = " ".join(word.text for word in heard)
    if trained and not heard:
        return Window(start, end, "", (), "silence")
    if by_ctc:
        return Window(start, end, spoken, tuple(heard), "ctc")
    whole = Heard((Recording("window", end - start, 1, len(encoded.frames)),), encoded)
    ways = [("language model", session.model.config.compression)]
    if session.tokens(whole, target_length)[0] < len(encoded.frames):
        ways.append(("every frame", "none"))
    text = ""
    for way, compression in ways:
        answer = session.ask(whole, TRANSCRIBE, target_length, compression=compression, stopping=[StopAtLoop()])
        text = answer.text
        if not trained and answer.ended:
            return Window(start, end, text, (), way)
        words, matched = lay_along(text, heard, start, end)
        if is_whole(answer, words, matched):
            return Window(start, end, text, tuple(words), way, left_out(heard, matched))
    if trained:
        return Window(start, end, spoken, tuple(heard), "ctc")
    return Window(start, end, text, (), "unfinished")


def is_whole(answer: Answer, words: Sequence[Word], matched: Sequence[bool]) -> bool:
    """Tells whether a window's text ended by itself and says what the CTC decoder hears, not less and not more."""
    if not answer.ended or any(not match and length >= LEFT_OUT for match, length in _runs(matched)):
        return False
    return len(words) < len(matched) + max(LEFT_OUT, len(matched) / 2)


def left_out(heard: Sequence[Word], matched: Sequence[bool]) -> float:
    """Returns the seconds of words that were heard and have no counterpart, `LEFT_OUT` or more in a row."""
    seconds, first = 0.0, 0
    for match, length in _runs(matched):
        if not match and length >= LEFT_OUT:
            seconds += heard[first + length - 1].end - heard[first].start
        first += length
    return seconds


def cover(windows: Sequence[Window], seconds: float) -> Coverage:
    """Returns how much of a recording of so many seconds its windows cover."""
    ways: dict[str, int] = {}
    for window in windows:
        ways[window.by] = ways.get(window.by, 0) + 1
    quiet = [window for window in windows if window.by == "silence"]
    empty = [window for window in windows if not window.text and window.by != "silence"]
    return Coverage(
        seconds=seconds,
        read=sum(window.end - window.start for window in windows),
        answered=sum(window.end - window.start - window.missed for window in windows if window.text),
        silent=sum(window.end - window.start for window in quiet),
        empty=tuple((window.start, window.end) for window in empty),
        windows=ways,
    )


class StopAtLoop(StoppingCriteria):
    """Ends an answer that has begun to repeat itself, which would else go on to the limit of tokens."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        looped = [loops(row) for row in input_ids[:, -LOOP_TOKENS * LOOP_TIMES :].tolist()]
        return torch.tensor(looped, device=input_ids.device)


def loops(ids: Sequence[int]) -> bool:
    """Tells whether tokens end in the same group again and again, `LOOP_TIMES` or more."""
    for group in range(1, LOOP_TOKENS + 1):
        length = max(LOOP_TIMES * group, LOOP_SHORTEST)
        if len(ids) >= length and all(ids[-place] == ids[-place - group] for place in range(1, length - group + 1)):
            return True
    return False


def _runs(values: Sequence[bool]) -> list[tuple[bool, int]]:
    return [(value, sum(1 for _ in run)) for value, run in groupby(values)]


def _frames(encoded: EncodedRecordings, first: int, stop: int) -> EncodedRecordings:
    """Returns some frames of one recording, with the times of the whole."""
    part = {name: getattr(encoded, name)[first:stop] for name in ("frames", "starts", "ends")}
    return replace(encoded, lengths=torch.tensor([stop - first]), audio=(), **part)


__all__ = ["Coverage", "Window", "cover", "cut_at_pauses", "find_pause", "read_windows", "transcribe"]
