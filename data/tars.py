"""Rows from tar files in the form of `webdataset`: a corpus in a few large files, read where each recording lies.

    speech-000.tar:  a1.flac  a1.json  a2.flac  a2.json  ...

The members of a row have the same name up to its first dot. Its texts are in `.json`, an object as a manifest's line
without `audio`, or its transcript is in `.txt`; the remaining one is its recording. The tar files are not compressed,
so that a recording is read without what is before it: rows come in any order, as from a manifest.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .audio import TarMember


def find_tars(source: str) -> list[str]:
    """Returns the tar files that a path or a pattern (`speech-*.tar`) names, in the order of their names."""
    return sorted(glob(source)) if source.endswith(".tar") else []


def tar_rows(paths: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Returns the rows of tar files, a ValueError for each that is not usable, and where every row stands."""
    rows: list[Any] = []
    places: list[str] = []
    for path in tqdm(paths, desc="listing tar files", unit="file", delay=1, disable=None):
        for name, members in _samples(path):
            rows.append(_row(name, members))
            places.append(f"{Path(path).name}, {name}")
    return rows, places


def _samples(path: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the members of every row by their endings: JSON and text as they are, recordings as their places."""
    samples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                content: Any = TarMember(path, member.offset_data, member.size, member.name)
                if ending in ("json", "txt"):
                    held = tar.extractfile(member)
                    content = b"" if held is None else held.read()
                samples.setdefault(f"{folder}/{stem}".lstrip("/"), {})[ending] = content
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} can't be read as a tar file ({error}); it must be whole, and not compressed."
        ) from error
    return list(samples.items())


def _row(name: str, members: dict[str, Any]) -> Any:
    """Returns the row that members of one name make, or a ValueError that says what is wrong with them."""
    recordings = [content for ending, content in members.items() if ending not in ("json", "txt")]
    if len(recordings) != 1:
        found = ", ".join(sorted(members))
        return ValueError(f"has the members {found}; it needs one recording beside .json or .txt")
    try:
        texts = json.loads(members["json"]) if "json" in members else {}
        said = {"text": members["txt"].decode("utf-8").strip()} if "txt" in members else {}
    except ValueError as error:
        return ValueError(f"holds no JSON or no text in UTF-8 ({error})")
    if not isinstance(texts, dict):
        return ValueError(f"has a .json that holds a {type(texts).__name__}; write an object")
    if isinstance(texts.get("messages"), list):
        _name_recording(texts["messages"], recordings[0])
        return {"messages": texts["messages"]}
    return said | texts | {"audio": recordings[0]}


def _name_recording(messages: list[Any], recording: TarMember) -> None:
    """Puts the recording into the audio parts of a conversation, which do not name it in a tar file."""
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") == "audio":
                part["audio"] = recording
