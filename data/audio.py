"""The samples that a row asks for: a whole recording, or the part of it between two seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from ..audio_fastlongspeech import load_recording
from ..windows_fastlongspeech import WINDOWS

SEEKABLE = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "FLAC")  # libsndfile finds a sample in these without decoding all


class TarMember(NamedTuple):
    """A recording inside a tar file: its name there, and where its bytes are."""

    path: str
    offset: int
    size: int
    name: str


def encoded(audio: Any) -> str | bytes | Any:
    """Returns the path or the bytes of a recording that a row names: a path, a tar's member, or `datasets`' form."""
    if isinstance(audio, TarMember):
        with open(audio.path, "rb") as tar:
            tar.seek(audio.offset)
            return tar.read(audio.size)
    if isinstance(audio, Mapping):
        return audio.get("bytes") or audio.get("path")
    return audio


def open_part(part: Mapping[str, Any]) -> Any:
    """Returns a row's recording, or the part of it between `start` and `end`, as `load_recording` takes it."""
    if part.get("start") is None and part.get("end") is None:
        return encoded(part["audio"]) if isinstance(part["audio"], TarMember) else part["audio"]
    return {"array": load_samples(part), "sampling_rate": WINDOWS.sampling_rate}


def load_samples(part: Mapping[str, Any]) -> np.ndarray:
    """Returns the samples `(n,)`, float32 at 16 kHz, of a row's recording.

    Args:
        part: `audio` as `encoded` takes it, and optionally `start` and `end` in seconds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the recording can't be read whole, or ends before `end`.
    """
    content = part["audio"] if isinstance(part["audio"], Mapping) else encoded(part["audio"])
    start, end = part.get("start"), part.get("end")
    if start is None and end is None:
        return load_recording(content, target_rate=WINDOWS.sampling_rate)
    start = start or 0.0
    if isinstance(content, str) and Path(content).is_file():
        found = _read_part(content, start, end)
        if found is not None:
            return load_recording(found, target_rate=WINDOWS.sampling_rate)
    samples = load_recording(content, target_rate=WINDOWS.sampling_rate)
    first, last = (round(second * WINDOWS.sampling_rate) for second in (start, end or 0.0))
    stop = len(samples) if end is None else min(last, len(samples))
    if end is not None and last - len(samples) > WINDOWS.frame_seconds * WINDOWS.sampling_rate:
        raise ValueError(
            f"end is {end} s, but the recording lasts {len(samples) / WINDOWS.sampling_rate:.2f} s; correct the row."
        )
    return load_recording({"array": samples[first:stop], "sampling_rate": WINDOWS.sampling_rate})


def _read_part(path: str, start: float, end: float | None) -> dict[str, Any] | None:
    """Returns a part of a file at its own rate, without decoding what is before it; None where that can't be done."""
    try:
        with soundfile.SoundFile(path) as file:
            if file.format not in SEEKABLE:
                return None
            first = round(start * file.samplerate)
            stop = file.frames if end is None else min(round(end * file.samplerate), file.frames)
            short = end is not None and end - file.frames / file.samplerate > WINDOWS.frame_seconds
            if short or first >= stop:
                return None  # let the whole recording say what is wrong
            file.seek(first)
            samples = file.read(stop - first, dtype="float32", always_2d=True)
            if len(samples) < stop - first:
                return None
            return {"array": samples, "sampling_rate": file.samplerate}
    except soundfile.SoundFileError:
        return None


__all__ = ["TarMember", "encoded", "load_samples", "open_part"]
