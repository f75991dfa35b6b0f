"""The command `transcribe`: a transcript of a recording of any duration, as text, JSON or subtitles.

With `--output`, every window that is written is kept in a file beside it, and a run that was stopped goes on there.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.journal import Journal, read_journal
from .commands import open_session, report_seconds
from .subtitles import Segment, as_json, as_srt, as_vtt, segments
from .words import Word, lay_along

if TYPE_CHECKING:
    from .transcript import Window

FORMATS = ("txt", "json", "srt", "vtt")
TIMES = ("segments", "words")


def print_transcript(arguments: argparse.Namespace) -> None:
    """Prints or writes the transcript of a recording, and to stderr what it covers."""
    from .transcript import cover

    output = None if arguments.output is None else Path(arguments.output)
    if output is not None and output.exists():
        raise ValueError(f"--output {output} exists already; name another file, or remove it.")
    form = "json" if arguments.json else arguments.format or "txt"
    session = open_session(arguments, progress=False)
    if not session.model.config.ctc_trained and (arguments.ctc or arguments.times == "words"):
        raise ValueError("this model has no trained CTC decoder, which alone knows words and their times.")
    samples = session.read(arguments.recording)
    seconds = len(samples) / session.processor.feature_extractor.sampling_rate
    print_now = None
    if output is None and form == "txt":
        print_now = print_text
    windows = list(write_all(session, samples, arguments, output, print_now))
    coverage = cover(windows, seconds)
    print(f"{arguments.recording}: {coverage}", file=sys.stderr)
    report_seconds(session)
    taken = {part: round(spent, 3) for part, spent in session.seconds.items()}
    facts = {"path": arguments.recording, "coverage": asdict(coverage), "seconds": taken}
    text = render(windows, form, arguments.times or "segments", facts)
    if output is not None:
        unfinished = Path(f"{output}.writing")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, output)
        journal_of(output).unlink()
        print(output)
    elif print_now is None:
        print(text, end="")


def write_all(
    session: Any,
    samples: Any,
    arguments: argparse.Namespace,
    output: Path | None,
    print_now: Callable[["Window", Any], None] | None,
) -> Iterator["Window"]:
    """Yields all windows of a recording: those that an earlier run has kept beside `output`, and then the others."""
    from tqdm import tqdm

    from .transcript import Window, read_windows, transcribe

    done: list[Window] = []
    journal = None
    if output is not None:
        started_as = describe_run(session, samples, arguments)
        kept = read_journal(journal_of(output))
        if kept and kept[0] != started_as:
            raise ValueError(
                f"{journal_of(output)} was begun for another recording, model or option; remove it to begin anew, or "
                "name another --output."
            )
        journal = Journal(journal_of(output))
        if not kept:
            journal.append(started_as)
        done = [Window(**{**row, "words": tuple(Word(*word) for word in row["words"])}) for row in kept[1:]]
        if done:
            print(f"goes on at {done[-1].end:.1f} s, from {journal_of(output)}", file=sys.stderr)
    yield from done
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
        "format": "fastlongspeech transcript 1",
        "recording": hashlib.blake2b(samples.tobytes(), digest_size=16).hexdigest(),
        "model": fingerprint_weights(session.model),
        "ctc": arguments.ctc,
        "target_length": arguments.target_length or session.model.config.target_length,
        "max_new_tokens": session.max_new_tokens,
    }


def journal_of(output: Path) -> Path:
    """Returns the file in which the windows of an unfinished transcript are kept."""
    return Path(f"{output}.unfinished")


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
