"""Rows of recordings and text, from a JSON-lines manifest or a `datasets` folder: what training and evaluation read.

A row is a recording with its text. Stage 1 reads `audio, text`, stage 2 `audio, question, answer`; other columns are
ignored. Rows come from

- a JSON-lines manifest, one object per line, paths relative to the manifest's folder, blank lines without meaning:
  `{"audio": "clips/a.flac", "text": "hello"}`, or
- a `datasets` folder: what `save_to_disk` wrote or what `load_dataset` can read. Where it holds several splits, name
  one after a `#`: `corpus#train`.

Every row is checked before work starts, and the header of its recording as well. The error names every bad row; no row
is left out silently.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import soundfile
from torch.utils.data import Dataset

from ..decoding_fastlongspeech import refuse_cut_file
from ..windows_fastlongspeech import WINDOWS

FAULTS_SHOWN = 10


class SpeechRows(Dataset):
    """The checked rows of a manifest or `datasets` folder.

    Indexed by a row number, or by a pair `(step, row number)` as `StepSampler` yields: then the row carries its
    optimiser step under `"step"`. With `target_length`, every row carries that number of frames instead, for
    evaluation at a fixed length.

    Attributes:
        durations (`list[float]`): seconds of every recording.
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
        row = {name: row[name] for name in self.columns}
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


def load_rows(source: str | Path, columns: Sequence[str]) -> SpeechRows:
    """Returns the rows of a JSON-lines manifest or a `datasets` folder.

    Args:
        source: path of the manifest, or of the folder (`folder#split` where it has several splits).
        columns: the columns every row must have, `"audio"` first; the others are text.

    Raises:
        FileNotFoundError: when there is nothing at `source`.
        ValueError: when a row is not usable; every bad row is named with its line (or row) number and the remedy.
    """
    path, _, split = str(source).partition("#")
    if Path(path).is_dir():
        return check_rows(_folder_rows(path, split, columns), str(source), columns, label="row", first=0)
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no manifest or datasets folder at {path!r}; check the path.")
    return check_rows(manifest_rows(Path(path)), str(source), columns, label="line", first=1)


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
            if isinstance(row, dict) and isinstance(row.get("audio"), str):
                row["audio"] = str((root or path.parent) / row["audio"])
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
    return found.select_columns(list(columns)).cast_column("audio", datasets.Audio(decode=False))


def check_rows(rows: Any, source: str, columns: Sequence[str], label: str, first: int) -> SpeechRows:
    """Returns the usable rows with their durations, or refuses the source and names every row that is not usable.

    Args:
        rows: a `datasets.Dataset`, or a list of objects, blank lines (None) and faults (ValueError).
        source: its name in the error.
        columns: what every row must have, `"audio"` first; the others are text.
        label: what a row is called in the error, `"line"` or `"row"`.
        first: number of the first row in the error.
    """
    places = [f"{label} {number}" for number in range(first, first + len(rows))]
    with ThreadPoolExecutor() as pool:
        checks = list(pool.map(lambda index: _check_row(rows[index], columns), range(len(rows))))
    refuse(source, [f"{place} {check}" for place, check in zip(places, checks, strict=True) if isinstance(check, str)])
    durations = [float(check) for check in checks if check is not None]
    if not durations:
        raise ValueError(f"{source} has no rows; write at least one with {', '.join(columns)}.")
    places = [place for place, check in zip(places, checks, strict=True) if check is not None]
    return SpeechRows(
        [row for row in rows if row is not None] if isinstance(rows, list) else rows, columns, durations, places
    )


def refuse(source: str, faults: Sequence[str]) -> None:
    """Raises a ValueError that names the faulty rows of a source, when there are any."""
    if faults:
        shown = "".join(f"\n  {fault}." for fault in faults[:FAULTS_SHOWN])
        more = f"\n  and {len(faults) - FAULTS_SHOWN} more." if len(faults) > FAULTS_SHOWN else ""
        raise ValueError(f"{source} has {len(faults)} bad rows; correct or remove them:{shown}{more}")


def _check_row(row: Any, columns: Sequence[str]) -> float | str | None:
    """Returns the seconds of a row's recording, None for a blank line, or what is wrong and how to mend it."""
    if row is None:
        return None
    if isinstance(row, ValueError):
        return str(row)
    if not isinstance(row, dict):
        return f"holds a {type(row).__name__}; write an object with {', '.join(columns)}"
    for column in columns:
        if column not in row:
            return f"has no {column!r}; it needs {', '.join(columns)}"
    for column in columns[1:]:
        if not isinstance(row[column], str) or not row[column].strip():
            return f"has {column!r} = {row[column]!r}; it must be text that is not empty"
    audio = row["audio"]
    if isinstance(audio, dict):  # what `datasets` hands out
        audio = audio.get("bytes") or audio.get("path")
    elif not isinstance(audio, str):
        return f"has 'audio' = {audio!r}; it must be the path of one recording"
    if isinstance(audio, str) and not Path(audio).is_file():
        return f"names the recording {audio}, which does not exist; correct the path"
    try:
        refuse_cut_file(audio, "it")
        info = soundfile.info(io.BytesIO(audio) if isinstance(audio, bytes) else audio)
    except (soundfile.SoundFileError, TypeError, OSError, ValueError) as error:
        return f"has a recording that can't be read ({error}); convert it to wav or flac"
    if info.frames >= 2**62:  # what libsndfile says of a FLAC that was written to a pipe
        return "has a recording whose header does not say how long it is; convert it to wav"
    duration = info.frames / info.samplerate
    if duration < WINDOWS.frame_seconds:
        return f"has a recording of {duration:.3f} s; it must last at least {WINDOWS.frame_seconds} s"
    return duration
