"""The command `transcribe`: a transcript of a recording of any duration, as text, JSON or subtitles.

With `--output`, every window that is written is kept in a file beside it, and a run that was stopped goes on there.
"""

import argparse
import contextlib
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.journal import Journal, read_journal
from .commands import check_recording, open_session, refuse_existing, report_seconds
from .subtitles import Segment, as_json, as_srt, as_vtt, segments
from .words import Word, lay_along

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from .transcript import Window

FORMAT = "fastlongspeech transcript 1"  # in the first line of an unfinished file
FORMATS = ("txt", "json", "srt", "vtt")
TIMES = ("segments", "words")


def print_transcript(arguments: argparse.Namespace) -> None:
    """Prints or writes the transcript of a recording, and to stderr what it covers."""
    from .transcript import cover

    output = None if arguments.output is None else Path(arguments.output)
    if output is not None:
        refuse_existing(output)
    check_recording(arguments.recording)
    form = arguments.format
    session = open_session(arguments, progress=False)
    if not session.model.config.ctc_trained and (arguments.ctc or arguments.times == "words"):
        raise ValueError("this model has no trained CTC decoder, which alone knows words and their times.")
    samples = session.read(arguments.recording)
    seconds = len(samples) / session.processor.feature_extractor.sampling_rate
    print_now = None
    if output is None and form == "txt":
        print_now = print_text
    kept: Any = contextlib.nullcontext((None, []))
    if output is not None:
        kept = keep_windows(output, describe_run(session, samples, arguments))
    with kept as (journal, done):
        windows = done + list(write_all(session, samples, arguments, done, journal, print_now))
        coverage = cover(windows, seconds)
        print(f"{arguments.recording}: {coverage}", file=sys.stderr)
        report_seconds(session)
        taken = {part: round(spent, 3) for part, spent in session.seconds.items()}
        facts = {"path": arguments.recording, "coverage": asdict(coverage), "seconds": taken}
        text = render(windows, form, arguments.times or "segments", facts)
        if output is not None:
            publish(text, output)
    if output is not None:
        journal_of(output).unlink(missing_ok=True)
        print(output)
    elif print_now is None:
        print(text, end="")


def write_all(
    session: Any,
    samples: Any,
    arguments: argparse.Namespace,
    done: list["Window"],
    journal: Journal | None,
    print_now: Callable[["Window", Any], None] | None,
) -> Iterator["Window"]:
    """Yields the windows of a recording after those that are done, each as soon as it is in the journal."""
    from tqdm import tqdm

    from .transcript import read_windows, transcribe

    start = done[-1].end if done else 0.0
    options: dict[str, Any] = {"desc": "transcribing", "unit": " s", "delay": 1, "leave": False, "disable": None}
    total = round(len(samples) / session.processor.feature_extractor.sampling_rate)
    with tqdm(total=total, initial=round(start), **options) as bar:
        found = transcribe(session, read_windows(session, samples, start), arguments.target_length, arguments.ctc)
        for window in found:
            if journal is not None:
                journal.append(asdict(window))
            if print_now is not None:
                print_now(window, bar)
            bar.update(round(window.end) - bar.n)
            yield window


def print_text(window: "Window", bar: Any) -> None:
    """Prints a window's text as it comes, without tearing the progress bar."""
    if window.text:
        bar.write(window.text, file=sys.stdout)


def describe_run(session: Any, samples: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what must be the same for a run to go on with what an earlier one has kept."""
    from ..recordings_fastlongspeech import fingerprint_weights

    return {
        "format": FORMAT,
        "recording": hashlib.blake2b(samples.tobytes(), digest_size=16).hexdigest(),
        "model": fingerprint_weights(session.model),
        "dtype": str(session.model.dtype),
        "compression": session.model.config.compression,
        "ctc": arguments.ctc,
        "target_length": arguments.target_length or session.model.config.target_length,
        "max_new_tokens": session.max_new_tokens,
    }


def journal_of(output: Path) -> Path:
    """Returns the file in which the windows of an unfinished transcript are kept."""
    return Path(f"{output}.unfinished")


@contextlib.contextmanager
def keep_windows(output: Path, started_as: dict[str, Any]) -> Iterator[tuple[Journal, list["Window"]]]:
    """Yields a journal for the windows of a transcript, and those that an earlier run has kept there.

    Raises:
        ValueError: another run writes the journal or has finished, or it is not one that this run may go on with.
    """
    refuse_existing(output)
    path = journal_of(output)
    with locked(path):
        done = read_windows_kept(path, started_as)
        with Journal(path) as journal:
            if not path.stat().st_size:
                journal.append(started_as)
            if done:
                print(f"goes on at {done[-1].end:.1f} s, from {path}", file=sys.stderr)
            yield journal, done


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other runs from a file, which is made where it is missing.

    Raises:
        ValueError: another run has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another run writes {path}; wait for its end, or name another --output.") from error
            except OSError:  # a file system without locks
                pass
        yield


def read_windows_kept(path: Path, started_as: dict[str, Any]) -> list["Window"]:
    """Returns the windows that an earlier run has kept; none in an empty file.

    Raises:
        ValueError: the file is damaged, no such file, or was begun otherwise than `started_as`.
    """
    rows = read_journal(path)
    if not rows and not path.stat().st_size:
        return []
    if not rows or rows[0].get("format") != FORMAT:
        raise ValueError(f"{path} is no unfinished transcript; rename or remove it, or name another --output.")
    if rows[0] != started_as:
        raise ValueError(
            f"{path} was begun for another recording, model or option; remove it to begin anew, or "
            "name another --output."
        )
    windows: list[Window] = []
    for row in rows[1:]:
        try:
            windows.append(read_window(row, windows[-1].end if windows else 0.0))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged: line {len(windows) + 2} is no window that begins where the last one ended; "
                "remove the file to begin anew, or name another --output."
            ) from error
    return windows


def read_window(row: dict[str, Any], start: float) -> "Window":
    """Returns the window that a line of a journal holds; it must begin at `start` seconds.

    Raises:
        KeyError, TypeError, ValueError: it holds none, or another one.
    """
    from .transcript import Window

    words = tuple(Word(str(text), float(begin), float(end)) for text, begin, end in row["words"])
    times = float(row["start"]), float(row["end"])
    if not (abs(times[0] - start) < 0.1 and times[0] < times[1] < math.inf):  # encoders' frames end within 0.1 s
        raise ValueError(times)
    return Window(*times, str(row["text"]), words, str(row["by"]), float(row["missed"]))


def publish(text: str, output: Path) -> None:
    """Writes the finished file, whole or not at all.

    Raises:
        ValueError: there is such a file by now.
    """
    writing = Path(f"{output}.writing")
    writing.write_text(text, encoding="utf-8")
    try:
        open(output, "x").close()  # what is replaced below is this empty file, never one that appeared meanwhile
    except FileExistsError as error:
        writing.unlink()
        raise ValueError(
            f"--output {output} appeared meanwhile; rename it and run the same command again: all windows are kept in "
            f"{journal_of(output)}."
        ) from error
    os.replace(writing, output)


def render(windows: list["Window"], form: str, times: str, facts: dict[str, Any]) -> str:
    """Returns a transcript in one of `FORMATS`, with the times of one of `TIMES`."""
    if form == "txt":
        return "".join(f"{window.text}\n" for window in windows if window.text)
    said: list[Segment | Word] = []
    for window in windows:
        # Where the CTC decoder is not trained, nothing is known but the window: its words share its time evenly.
        words = window.words or lay_along(window.text, [], window.start, window.end)[0]
        said += words if times == "words" else segments(words)
    if form == "json":
        return as_json({"text": " ".join(w.text for w in windows if w.text), times: said, **facts})
    return as_srt(said) if form == "srt" else as_vtt(said)
