"""How long recordings are: every header is read once, then remembered until its file changes.

What is known lies in `HF_HOME/fastlongspeech/headers`, one Parquet file for every manifest. A file counts as changed
when its size or its time of change is another. Of the files of a million rows only these two are asked when a manifest
is opened again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from huggingface_hub import constants
from tqdm import tqdm

from ..decoding_fastlongspeech import recording_seconds
from .audio import TarMember, encoded

READERS = 16  # threads: they wait for the disk more than they compute
CHUNK = 1000
SAVED = 50_000  # headers read before they are written down, so that a stopped start goes on


class _Identity(NamedTuple):
    """A recording as it was when its header was read."""

    name: str
    size: int
    changed: int


def read_durations(recordings: Sequence[str | TarMember], source: str) -> list[float | str]:
    """Returns the seconds of every recording, or what is wrong with it and how to mend it.

    Args:
        recordings: paths or members of tar files; the same one may come often.
        source: the manifest they are named in, under which what is known is kept.
    """
    memory = _memory(source)
    known = _recall(memory)
    distinct = list(dict.fromkeys(recordings))
    identities = _identify(distinct)
    unknown = [n for n, identity in enumerate(identities) if not isinstance(identity, str) and identity not in known]
    with _progress(len(unknown)) as bar:
        for start in range(0, len(unknown), SAVED):
            part = unknown[start : start + SAVED]
            found = dict(zip((identities[n] for n in part), _read_all([distinct[n] for n in part], bar), strict=True))
            known |= found
            good = {i: known[i] for i in identities if isinstance(i, _Identity) and isinstance(known.get(i), float)}
            _remember(memory, good)
    seconds = [i if isinstance(i, str) else known[i] for i in identities]
    return list(map(dict(zip(distinct, seconds, strict=True)).__getitem__, recordings))


def read_dataset_durations(rows: Any, source: str) -> list[float | str]:
    """Returns the same of the `audio` of a `datasets.Dataset`; what it holds itself is known by its fingerprint."""
    chunks = rows.select_columns(["audio"]).with_format("arrow")[:]["audio"].chunks
    outside = sum(chunk.field("bytes").null_count for chunk in chunks)
    if outside == len(rows):
        return read_durations([path for chunk in chunks for path in chunk.field("path").to_pylist()], source)
    memory = _memory(source)
    known = {i.size: seconds for i, seconds in _recall(memory).items() if i.name == rows._fingerprint}
    if len(known) == len(rows):
        return [known[row] for row in range(len(rows))]
    with _progress(len(rows)) as bar:
        found = _read_all((rows[row]["audio"] for row in range(len(rows))), bar)
    if not outside:
        good = {_Identity(rows._fingerprint, row, 0): s for row, s in enumerate(found) if isinstance(s, float)}
        _remember(memory, good)
    return found


def _memory(source: str) -> Path:
    place = os.path.abspath(source.partition("#")[0]) + source.partition("#")[2]
    name = f"{Path(place).stem[:40]}-{hashlib.sha256(place.encode()).hexdigest()[:16]}.parquet"
    return Path(constants.HF_HOME) / "fastlongspeech" / "headers" / name


def _recall(memory: Path) -> dict[Any, Any]:
    try:
        columns = pyarrow.parquet.read_table(memory).to_pydict()
        rows = zip(columns["name"], columns["size"], columns["changed"], columns["seconds"], strict=True)
        return {_Identity(name, size, changed): seconds for name, size, changed, seconds in rows}
    except (OSError, KeyError, pyarrow.ArrowException):  # there is none, or it is damaged: headers are read again
        return {}


def _remember(memory: Path, known: dict[_Identity, float]) -> None:
    columns = {field: [getattr(identity, field) for identity in known] for field in _Identity._fields}
    table = pyarrow.table(columns | {"seconds": list(known.values())})
    memory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = memory.with_suffix(f".{os.getpid()}.tmp")
    pyarrow.parquet.write_table(table, unfinished)
    unfinished.replace(memory)  # at once: of several processes that write, the last one counts


def _identify(recordings: Sequence[str | TarMember]) -> list[_Identity | str]:
    """Returns what tells each recording from others and from what it was before, or what is wrong with it."""
    chunks = [recordings[start : start + CHUNK] for start in range(0, len(recordings), CHUNK)]
    with ThreadPoolExecutor(READERS) as pool:
        return [identity for chunk in pool.map(_identify_chunk, chunks) for identity in chunk]


def _identify_chunk(recordings: Sequence[str | TarMember]) -> list[_Identity | str]:
    identities: list[_Identity | str] = []
    for audio in recordings:
        path = audio.path if isinstance(audio, TarMember) else audio
        try:
            status = os.stat(path)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            why = "does not exist; correct the path" if missing else f"can't be opened ({error.strerror}); mend it"
            identities.append(f"names the recording {path}, which {why}")
            continue
        name = os.path.abspath(path) + (f"@{audio.offset}" if isinstance(audio, TarMember) else "")
        identities.append(_Identity(name, status.st_size, status.st_mtime_ns))
    return identities


def _progress(count: int) -> Any:
    return tqdm(total=count, desc="reading headers", unit="file", delay=1, disable=None)


def _read_all(recordings: Iterable[Any], bar: Any) -> list[float | str]:
    found: list[float | str] = []
    waiting = iter(recordings)
    with ThreadPoolExecutor(READERS) as pool:
        while chunk := list(islice(waiting, CHUNK)):  # so that few recordings are held in memory at a time
            found += pool.map(_read_header, chunk)
            bar.update(len(chunk))
    return found


def _read_header(audio: Any) -> float | str:
    try:
        return float(recording_seconds(encoded(audio), "it"))
    except (OSError, TypeError, ValueError) as error:
        return f"has a recording that can't be read ({error}); convert it to wav or flac"
