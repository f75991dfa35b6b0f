"""Rows of recordings and text, from a manifest, tar files or a `datasets` folder: what training and evaluation read.

A row is one recording with its text. A manifest has a JSON object on every line; blank lines have no meaning:

    {"audio": "clips/a.flac", "text": "hello"}                                            what stage 1 reads
    {"audio": "clips/a.flac", "question": "Who calls?", "answer": "Anna."}                what stage 2 reads
    {"audio": "talk.flac", "start": 61.5, "end": 80.0, "text": "so much for today"}       a part, in seconds
    {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.flac"}, {"type": "audio", "audio":
        "b.flac"}, {"type": "text", "text": "Who speaks twice?"}]}, {"role": "assistant", "content": "Nobody."}]}

Paths are relative to the manifest's folder. `duration`, the seconds of the whole recording, is compared with the file;
columns with other names are ignored. Conversations (`messages`) have any number of turns and recordings, and the last
turn is the assistant's; each answer in them becomes a row of its own, with the turns before it as its prompt.

Other sources are tar files (see `tars.py`) and a `datasets` folder: what `save_to_disk` wrote or `load_dataset` reads.
Where it holds several splits, name one after a `#`: `corpus#train`.

Every row is checked before work starts, and the header of its recording as well. The error names every bad row; no row
is left out silently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from ..windows_fastlongspeech import WINDOWS
from .audio import TarMember
from .headers import read_dataset_durations, read_durations
from .tars import find_tars, tar_rows

FAULTS_SHOWN = 10
PLACE = ("start", "end")  # of a part, in seconds
CUT = re.compile(r"is cut off(?!, damaged or of no format)|changed or cut")
TOLERANCE = 0.1  # seconds that a row's duration may differ from its recording's: codecs add delays


class SpeechRows(Dataset):
    """The checked rows of a source.

    Indexed by a row number, or by a pair `(step, row number)` as `StepSampler` yields: then the row carries its
    optimiser step under `"step"`. With `target_length`, every row carries that number of frames instead, for
    evaluation at a fixed length.

    Attributes:
        durations (`list[float]`): seconds of every row's recordings together.
        places (`list[str]`): where every row stands in its source, such as `"line 7"`.
    """

    def __init__(
        self,
        rows: Any,
        columns: Sequence[str],
        durations: list[float],
        places: list[str],
        target_length: int | None = None,
    ):
        self.rows, self.columns, self.durations, self.places = rows, tuple(columns), durations, places
        self.target_length = target_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        step, index = key if isinstance(key, tuple) else (None, key)
        row = self.rows[index]
        wanted = ("messages", "answer") if "messages" in row else (*self.columns, *PLACE)
        row = {name: row[name] for name in wanted if row.get(name) is not None}
        if step is not None:
            row["step"] = step
        if self.target_length is not None:
            row["target_length"] = self.target_length
        return row

    def at(self, target_length: int) -> SpeechRows:
        """Returns the same rows, all to be fused to `target_length` frames."""
        return SpeechRows(self.rows, self.columns, self.durations, self.places, target_length)

    def texts(self, column: str) -> list[str]:
        """Returns one column of all rows, without touching their audio."""
        return [row[column] for row in self.rows] if isinstance(self.rows, list) else list(self.rows[column])


class Fault(NamedTuple):
    """What is wrong with a row: where it stands, which check found it, and a sentence that goes on from the place."""

    place: str
    kind: str
    text: str


class Examined(NamedTuple):
    """Rows that are usable, with the seconds of their recordings and their places, and the faults of the others."""

    rows: Any
    durations: list[float]
    places: list[str]
    faults: list[Fault]


def load_rows(source: str | Path, columns: Sequence[str]) -> SpeechRows:
    """Returns the rows of a source.

    Args:
        source: path of a manifest, of tar files (`speech-*.tar`) or of a folder (`folder#split` where it has several).
        columns: the columns every row must have, `"audio"` first; the others are text. Where they are question and
            answer, a row may have `messages` instead.

    Raises:
        FileNotFoundError: when there is nothing at `source`.
        ValueError: when a row is not usable; every bad row is named with its line (or row) number and the remedy.
    """
    return _usable(examine_source(source, columns), str(source), columns)


def examine_source(source: str | Path, columns: Sequence[str]) -> Examined:
    """Returns the usable rows of a source and the faults of the others.

    Raises:
        FileNotFoundError: there is nothing at `source`.
    """
    path, _, split = str(source).partition("#")
    if Path(path).is_dir():
        return examine(_folder_rows(path, split, columns), str(source), columns, label="row", first=0)
    tars = find_tars(path)
    if tars:
        rows, names = tar_rows(tars)
        return examine(rows, str(source), columns, label="row", first=0, names=names)
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no manifest, tar file or datasets folder at {path!r}; check the path.")
    return examine(manifest_rows(Path(path)), str(source), columns, label="line", first=1)


def manifest_rows(path: Path, root: Path | None = None) -> list[Any]:
    """Returns what every line holds: an object, None when it is blank, a ValueError when it is no JSON.

    Recordings are relative to `root`, by default the manifest's folder.
    """
    rows: list[Any] = []
    with open(path, encoding="utf-8-sig") as lines:
        for line in lines:
            try:
                row = json.loads(line) if line.strip() else None
            except json.JSONDecodeError as error:
                row = ValueError(f"is not JSON ({error}); write one object per line")
            if isinstance(row, dict):
                for part in (row, *_audio_parts(row.get("messages"))):
                    if isinstance(part.get("audio"), str):
                        part["audio"] = str((root or path.parent) / part["audio"])
            rows.append(row)
    return rows


def open_folder(path: str, split: str) -> Any:
    """Returns the `datasets.Dataset` in a folder with all its columns; where it has several splits, the one named.

    Raises:
        ValueError: `datasets` can't read the folder, or there is no such split.
    """
    import datasets

    if any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
        found = datasets.load_from_disk(path)
    else:
        try:
            found = datasets.load_dataset(path)
        except datasets.exceptions.DatasetGenerationError as error:  # a folder of sound files needs torchcodec
            reason = error.__cause__ or error
            raise ValueError(
                f"{path} can't be read by datasets ({reason}); or write a JSON-lines manifest."
            ) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found and (split or len(found) > 1):
            raise ValueError(
                f"{path} has the splits {', '.join(found)}, got {split!r}; name one, as in {path}#{next(iter(found))}."
            )
        found = found[split or next(iter(found))]
    elif split:
        raise ValueError(f"{path} has no splits, got {split!r}; leave #{split} out.")
    return found


def _folder_rows(path: str, split: str, columns: Sequence[str]) -> Any:
    """Returns the `datasets.Dataset` in a folder, its audio left encoded."""
    import datasets

    found = open_folder(path, split)
    missing = [column for column in columns if column not in found.column_names]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)} among {', '.join(found.column_names)}; rename its columns."
        )
    wanted = [*columns, *(name for name in PLACE if name in found.column_names)]
    return found.select_columns(wanted).cast_column("audio", datasets.Audio(decode=False))


def check_rows(rows: Any, source: str, columns: Sequence[str], label: str, first: int) -> SpeechRows:
    """Returns the usable rows with their durations, or refuses the source and names every row that is not usable.

    The arguments are those of `examine`.
    """
    return _usable(examine(rows, source, columns, label, first), source, columns)


def _usable(found: Examined, source: str, columns: Sequence[str]) -> SpeechRows:
    refuse(source, [f"{fault.place} {fault.text}" for fault in found.faults])
    if not found.durations:
        raise ValueError(f"{source} has no rows; write at least one with {', '.join(columns)}.")
    return SpeechRows(found.rows, columns, found.durations, found.places)


def examine(
    rows: Any, source: str, columns: Sequence[str], label: str, first: int, names: Sequence[str] | None = None
) -> Examined:
    """Returns the usable rows and the faults of the others.

    Args:
        rows: a `datasets.Dataset`, or a list of objects, blank lines (None) and faults (ValueError).
        source: its name in the error, and that under which durations are remembered.
        columns: what every row must have, `"audio"` first; the others are text.
        label: what a row is called in the error, `"line"` or `"row"`.
        first: number of the first row in the error.
        names: what rows are called instead of `label` and a number.
    """
    if not isinstance(rows, list):
        return _examine_dataset(rows, source, columns, label, first)
    names = names or [f"{label} {number}" for number in range(first, first + len(rows))]
    kept, places, faults, numbers = [], [], [], []
    for number, (name, raw) in enumerate(zip(names, rows, strict=True)):
        if raw is None:
            continue
        fault = text_fault(raw, columns)
        if fault:
            faults.append((number, Fault(name, "text", fault)))
            continue
        for turn, row in enumerate(_answers(raw)):
            kept.append(row)
            places.append(name + (f", answer {turn + 1}" if turn else ""))
            numbers.append(number)
    parts = [recordings_of(row) for row in kept]
    seconds = iter(read_durations([part["audio"] for of_row in parts for part in of_row], source))
    checked = [[_part_seconds(part, next(seconds)) for part in of_row] for of_row in parts]
    good = []
    for number, found in enumerate(checked):
        fault = next((part for part in found if isinstance(part, str)), None)
        if fault is None:
            good.append(number)
        else:
            faults.append((numbers[number], Fault(places[number], fault_kind(fault), fault)))
    durations = [float(sum(checked[number])) for number in good]  # type: ignore[arg-type]  # no fault among them
    in_order = [fault for _, fault in sorted(faults, key=lambda found: found[0])]
    return Examined([kept[number] for number in good], durations, [places[number] for number in good], in_order)


def _examine_dataset(rows: Any, source: str, columns: Sequence[str], label: str, first: int) -> Examined:
    texts = rows.remove_columns("audio") if rows.column_names != ["audio"] else [{}] * len(rows)
    faults, durations, good = [], [], []
    for number, (row, whole) in enumerate(zip(texts, read_dataset_durations(rows, source), strict=True)):
        fault = text_fault({"audio": "", **row}, columns)
        seconds = fault or _part_seconds(row, whole)
        if isinstance(seconds, str):
            faults.append(Fault(f"{label} {number + first}", "text" if fault else fault_kind(seconds), seconds))
        else:
            durations.append(seconds)
            good.append(number)
    kept = rows if len(good) == len(rows) else rows.select(good)
    return Examined(kept, durations, [f"{label} {number + first}" for number in good], faults)


def refuse(source: str, faults: Sequence[str]) -> None:
    """Raises a ValueError that names the faulty rows of a source, when there are any."""
    if faults:
        shown = "".join(f"\n  {fault}." for fault in faults[:FAULTS_SHOWN])
        more = f"\n  and {len(faults) - FAULTS_SHOWN} more." if len(faults) > FAULTS_SHOWN else ""
        raise ValueError(f"{source} has {len(faults)} bad rows; correct or remove them:{shown}{more}")


def recordings_of(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the recordings of a row in order, each an object with `audio` and perhaps `start` and `end`."""
    return [*_audio_parts(row["messages"])] if "messages" in row else [row]


def _audio_parts(messages: Any) -> list[dict[str, Any]]:
    contents = [message.get("content") for message in messages or () if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if isinstance(part, dict) and part.get("type") == "audio"]


def _answers(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a row as it is, or one row for every answer in its conversation: `messages` before it, and `answer`."""
    if "messages" not in row:
        yield row
        return
    for number, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            content = message["content"]
            answer = content if isinstance(content, str) else "".join(part["text"] for part in content)
            yield {"messages": row["messages"][:number], "answer": answer}


def text_fault(row: Any, columns: Sequence[str]) -> str | None:
    """Returns what is wrong with all of a row but its recordings, and how to mend it, or None."""
    if isinstance(row, ValueError):
        return str(row)
    if not isinstance(row, dict):
        return f"holds a {type(row).__name__}; write an object with {', '.join(columns)}"
    if "messages" in row and "answer" in columns:
        return _conversation_fault(row)
    for column in columns:
        if column not in row:
            return f"has no {column!r}; it needs {', '.join(columns)}"
    for column in columns[1:]:
        if not isinstance(row[column], str) or not row[column].strip():
            return f"has {column!r} = {row[column]!r}; it must be text that is not empty"
    return _place_fault(row)


def _conversation_fault(row: dict[str, Any]) -> str | None:
    extra = [name for name in ("audio", "question", "answer", *PLACE) if row.get(name) is not None]
    if extra:
        return f"has messages and {', '.join(extra)}; name recordings and texts in the messages alone"
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return "has messages that are no list of objects; write each with role and content"
    for message in messages:
        role, content = message.get("role"), message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if role not in ("system", "user", "assistant"):
            return f"has a message with the role {role!r}; write system, user or assistant"
        if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
            return f"has a message of the {role} without content; write text, or a list of parts"
        for part in parts:
            text = part.get("text")
            if part.get("type") == "audio" and role != "assistant":
                fault = "an audio part without audio; name a recording" if "audio" not in part else _place_fault(part)
                if fault:
                    return fault if fault.startswith("has") else f"has {fault}"
            elif part.get("type") != "text" or not isinstance(text, str) or not text.strip():
                return f"has a part of the {role} that is no text, or empty; write text, or of the user audio"
    if not messages or messages[-1]["role"] != "assistant":
        return "has messages that do not end with the assistant's; what it should answer is learned"
    first = next(number for number, message in enumerate(messages) if message["role"] == "assistant")
    return None if _audio_parts(messages[:first]) else "has no recording before its first answer; name one"


def _place_fault(part: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with a recording's name and place, before its header is read."""
    if not isinstance(part["audio"], (str, TarMember)):
        return f"has 'audio' = {part['audio']!r}; it must be the path of one recording"
    for name in (*PLACE, "duration"):
        value = part.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0):
            return f"has {name!r} = {value!r}; it must be seconds"
    return None


def _part_seconds(part: Mapping[str, Any], whole: float | str) -> float | str:
    """Returns the seconds of a part of a recording that lasts `whole`, or what is wrong with it."""
    if isinstance(whole, str):
        return whole
    named, start, end = part.get("duration"), part.get("start") or 0.0, part.get("end")
    if named is not None and abs(named - whole) > TOLERANCE:
        return f"has 'duration' = {named}, but its recording lasts {whole:.3f} s; has it been changed or cut?"
    end = whole if end is None else end
    if end > whole + WINDOWS.frame_seconds:
        return f"has 'end' = {end}, but its recording lasts {whole:.3f} s; correct it"
    seconds = min(end, whole) - start
    if seconds < WINDOWS.frame_seconds:
        return f"has a recording of {seconds:.3f} s; it must last at least {WINDOWS.frame_seconds} s"
    return seconds


def fault_kind(fault: str) -> str:
    """Returns which of the faults of recordings it is, by its words: missing, cut, unreadable, or place."""
    if CUT.search(fault):
        return "cut"
    marks = {"missing": ("does not exist", "not found"), "unreadable": ("can't be", "cannot be")}
    return next((kind for kind, words in marks.items() if any(word in fault for word in words)), "place")
