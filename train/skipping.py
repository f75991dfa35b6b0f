"""Bad samples while training: skipped, counted by reason, listed; more than a set share of them ends the run.

Every row was good when the run began. A network disk may fail later, or a file change. Then the next row of the source
takes the place of the one that can't be read, so that every step keeps its number of samples. What was skipped is
written to `bad-samples.jsonl` in the output folder at once, by whichever process or worker met it.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback

from ..data.audio import TarMember, load_samples
from ..data.manifests import PLACE, fault_kind, recordings_of
from ..data.streams import StreamRows
from ..windows_fastlongspeech import WINDOWS

BAD_SAMPLES = "bad-samples.jsonl"
TRIES = 50  # rows one after the other that can't be read: then the disk is gone, not a file
PAUSES = (1.0, 5.0)  # seconds before a disk that failed is asked again
GONE = (
    "{} rows one after the other can't be read, the last is {}; see that the disk with the recordings is there, and "
    "give the same command again to go on."
)
TOLERANCE = 0.5  # seconds that a recording may differ from what its header said when the run began
FEW = 1000  # samples, of which a share is counted from the beginning
SHOWN = 20


def steady(rows: Any, journal: Path, start: Callable[[], dict[str, int]]) -> Any:
    """Returns rows, a stream, or a dictionary of rows, made steady."""
    if isinstance(rows, dict):
        return {name: steady(part, journal, start) for name, part in rows.items()}
    if isinstance(rows, StreamRows):
        return SteadyStream(rows, journal, start)
    return None if rows is None else SteadyRows(rows, journal)


class SteadyRows(Dataset):
    """Rows with their recordings read; one that can't be read is noted, and the next of the source takes its place.

    Args:
        rows: a dataset whose rows name their recordings, with `durations` and `places`.
        journal: the file for what is skipped.
    """

    def __init__(self, rows: Any, journal: Path):
        self.rows, self.journal = rows, journal
        self.durations, self.mixture = rows.durations, getattr(rows, "mixture", None)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        step, index = key if isinstance(key, tuple) else (None, key)
        tries = min(TRIES, len(self))
        for number in ((index + further) % len(self) for further in range(tries)):
            row = self.rows[number if step is None else (step, number)]
            try:
                return read_row(row, self.durations[number])
            except (OSError, TypeError, ValueError) as error:
                note(self.journal, self.rows.places[number], step, row, error)
        raise RuntimeError(GONE.format(tries, self.rows.places[number]))


class SteadyStream(IterableDataset):
    """The rows of a stream with their recordings read; in place of one that can't be, the last good one comes again.

    So a row that arrives is a sample of the run in any case, and a resumed run finds its place by counting.

    Args:
        rows: the stream.
        journal: the file for what is skipped.
        start: returns what `StreamRows.arriving` takes.
    """

    def __init__(self, rows: StreamRows, journal: Path, start: Callable[[], dict[str, int]]):
        self.rows, self.journal, self.start = rows, journal, start

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is not forked gets where it begins, not the Trainer that tells it.
        return self.__dict__ | {"start": partial(dict, self.start())}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        good: dict[str, Any] | None = None
        failed, owed = 0, []
        for place, step, row, fault in self.rows.arriving(**self.start()):
            try:
                if fault:
                    raise ValueError(f"it {fault}")
                good, failed = read_row(row), 0
            except (OSError, TypeError, ValueError) as error:
                note(self.journal, place, step, row, error)
                failed += 1
                if failed == TRIES:
                    raise RuntimeError(GONE.format(failed, place)) from error
            owed.append(step)
            if good is not None:
                yield from (good | {"step": due} for due in owed)
                owed = []


def read_row(row: dict[str, Any], expected: float | None = None) -> dict[str, Any]:
    """Returns a row with samples instead of the names of its recordings.

    Raises:
        OSError, TypeError, ValueError: a recording can't be read, or lasts other than `expected` seconds.
    """
    samples = [_patiently(part) for part in recordings_of(row)]
    seconds = sum(map(len, samples)) / WINDOWS.sampling_rate
    if expected is not None and abs(seconds - expected) > TOLERANCE:
        raise ValueError(f"it lasts {seconds:.2f} s, and {expected:.2f} s when the run began: it has changed.")
    heard = iter([{"array": array, "sampling_rate": WINDOWS.sampling_rate} for array in samples])
    if "messages" not in row:
        return {name: value for name, value in row.items() if name not in PLACE} | {"audio": next(heard)}
    messages = []
    for message in row["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = [{"type": "audio", "audio": next(heard)} if p["type"] == "audio" else p for p in content]
        messages.append(message | {"content": content})
    return row | {"messages": messages}


def note(journal: Path, place: str, step: int | None, row: dict[str, Any], error: Exception) -> None:
    """Writes down that a row was skipped."""
    audio = [_name(part["audio"]) for part in recordings_of(row)]
    line = {"place": place, "audio": audio, "step": step, "kind": _kind(error), "reason": str(error)}
    journal.parent.mkdir(parents=True, exist_ok=True)
    with open(journal, "a", encoding="utf-8") as file:  # one write: lines of several writers do not mix
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _name(audio: Any) -> str:
    if isinstance(audio, dict):  # what `datasets` hands out
        return str(audio.get("path") or "a recording inside the dataset")
    return f"{audio.path}, {audio.name}" if isinstance(audio, TarMember) else str(audio)


def _patiently(part: Any) -> Any:
    """Returns the samples of a recording; a disk that fails is asked again after a pause."""
    for pause in PAUSES:
        try:
            return load_samples(part)
        except (OSError, ValueError) as error:
            failed = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(failed, OSError) or failed.errno is None or isinstance(failed, FileNotFoundError):
                raise
            time.sleep(pause)
    return load_samples(part)


def _kind(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    return "changed" if "has changed" in str(error) else fault_kind(str(error)).replace("place", "unusable")


class ReportBadSamples(TrainerCallback):
    """Ends a run that has skipped too much, and lists at its end what it has skipped.

    Args:
        journal: the file for what is skipped.
        share: the largest part of the samples drawn so far that may be bad.
        samples_per_step: rows in one optimiser step, all processes together.
    """

    def __init__(self, journal: Path, share: float, samples_per_step: int):
        self.journal, self.share, self.samples_per_step = journal, share, samples_per_step
        self.size = 0

    def read(self) -> list[dict[str, Any]]:
        """Returns what was skipped, once for every step and row: steps after the last checkpoint may come again."""
        if not self.journal.exists():
            return []
        lines = [json.loads(line) for line in self.journal.read_text(encoding="utf-8").split("\n") if line]
        return list({(line["step"], line["place"]): line for line in lines}.values())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        size = os.path.getsize(self.journal) if self.journal.exists() else 0
        if size == self.size:
            return
        self.size = size
        bad = [line for line in self.read() if line["step"] is not None]
        drawn = max(state.global_step * self.samples_per_step, FEW)
        if len(bad) > self.share * drawn:
            raise RuntimeError(
                f"{len(bad)} samples of {drawn} could not be read ({_counts(bad)}), which is more than max_bad_share "
                f"{self.share:g}; see {self.journal}, mend them, and give the same command again to go on."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        bad = self.read()
        if not bad or not state.is_world_process_zero:
            return
        print(f"# {len(bad)} samples were skipped ({_counts(bad)}); all of them are in {self.journal}", flush=True)
        for line in bad[:SHOWN]:
            print(f"#   {line['place']}: {', '.join(line['audio'])}: {line['reason']}", flush=True)


def _counts(bad: list[dict[str, Any]]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(line["kind"] for line in bad).most_common())
