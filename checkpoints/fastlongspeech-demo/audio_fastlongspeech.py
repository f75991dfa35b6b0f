"""Recordings of any kind, decoded: files, URLs, bytes and arrays -> mono samples at 16 kHz."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from huggingface_hub import get_session
from transformers.utils import logging

from .windows_fastlongspeech import WINDOWS

logger = logging.get_logger(__name__)

BLOCK = 2**22  # samples of a file decoded at a time
PCM_DTYPES = ("uint8", "int16", "int32")
STREAMED_BYTES = 0x7FFF0000  # what a WAV header names at least whose writer could not know the length


def load_recording(audio: Any, sampling_rate: float | None = None, target_rate: int = 16000) -> np.ndarray:
    """Returns one recording as mono samples `(n,)`, float32, at `target_rate` hertz.

    Args:
        audio: a path, an http(s) URL or the bytes of an audio file (anything soundfile reads; anything else where
            ffmpeg is installed); an array, tensor or list of samples, `(n,)`, `(channels, n)` or `(n, channels)`,
            floating point or uint8/int16/int32 PCM; `{"array": ..., "sampling_rate": ...}`; or what `datasets` hands
            out, `{"bytes": ..., "path": ...}` or a decoder of torchcodec.
        sampling_rate: hertz of an array that does not bring its own rate; files have theirs. An array without any is
            taken as `target_rate`, with a warning.
        target_rate: hertz of the result.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: `audio` is none of the above or holds no real numbers.
        ValueError: the audio is unreadable, empty, not finite or shorter than one 40 ms frame, a WAV file is cut off,
            or the sampling rate is no positive number.
    """
    name = str(audio) if isinstance(audio, (str, os.PathLike)) else type(audio).__name__
    if hasattr(audio, "get_all_samples"):
        decoded = audio.get_all_samples()
        audio, sampling_rate = decoded.data, decoded.sample_rate
    elif isinstance(audio, Mapping):
        if audio.get("array") is not None:
            sampling_rate = audio["sampling_rate"] if audio.get("sampling_rate") is not None else sampling_rate
            audio = audio["array"]
        elif audio.get("bytes") is not None:
            audio = audio["bytes"]
        elif audio.get("path") is not None:
            name = str(audio["path"])
            audio = audio["path"]
        else:
            raise TypeError(f'an audio dictionary must have "array", "bytes" or "path", got the keys {sorted(audio)}.')

    if isinstance(audio, (str, os.PathLike, bytes, bytearray, memoryview)):
        samples = _decode(audio, name, target_rate)
    else:
        array = _to_float_samples(audio)
        if sampling_rate is None:
            logger.warning_once(
                f"audio was given as an array without a sampling rate and is taken as {target_rate} Hz; "
                "pass sampling_rate=... to say so or to have it resampled."
            )
            sampling_rate = target_rate

        if isinstance(sampling_rate, (torch.Tensor, np.ndarray)) and sampling_rate.ndim == 0:
            sampling_rate = sampling_rate.item()
        real = isinstance(sampling_rate, (int, float, np.integer, np.floating)) and not isinstance(sampling_rate, bool)
        if not real or not 0 < sampling_rate < float("inf"):
            raise ValueError(f"sampling_rate must be a positive number of hertz, got {sampling_rate!r}.")
        if array.ndim == 2 and array.shape[0] < array.shape[1]:
            array = array.T  # there are fewer channels than samples
        samples = _mix_and_resample([array] if array.size else [], sampling_rate, target_rate)

    if samples.size == 0:
        raise ValueError(f"audio is empty: {name} holds no samples.")
    if not np.isfinite(samples).all():
        raise ValueError(f"audio must be finite, but {name} holds NaN or infinite samples.")
    if len(samples) < WINDOWS.frame_seconds * target_rate:
        raise ValueError(
            f"audio must last at least one 40 ms frame, but {name} lasts {1000 * len(samples) / target_rate:.1f} ms."
        )
    return np.ascontiguousarray(samples, dtype=np.float32)


def _mix_and_resample(blocks: Iterable[np.ndarray], sampling_rate: float, target_rate: int) -> np.ndarray:
    """Returns the mono samples at `target_rate` of consecutive blocks `(n,)` or `(n, channels)`, float32."""
    resampler = soxr.ResampleStream(sampling_rate, target_rate, 1, dtype="float32", quality="HQ")
    parts = []
    for block in blocks:
        mono = block if block.ndim == 1 else block.mean(axis=1)
        parts.append(mono if sampling_rate == target_rate else resampler.resample_chunk(mono))
    if sampling_rate != target_rate:
        parts.append(resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, dtype=np.float32)])


def _to_float_samples(audio: Any) -> np.ndarray:
    """Returns an array, tensor or list of samples as float32 `(n,)` or 2-D, PCM integers scaled to [-1, 1)."""
    if isinstance(audio, torch.Tensor):
        audio = audio.detach().cpu()
        audio = audio.float().numpy() if audio.is_floating_point() else audio.numpy()
    elif not isinstance(audio, (np.ndarray, Sequence)):
        raise TypeError(
            "audio must be a path, a URL, bytes, an array, a tensor or a dictionary with one of them, "
            f"got {type(audio).__name__}."
        )
    array = np.asarray(audio)
    if array.ndim not in (1, 2):
        raise ValueError(f"audio must have the shape (samples,) or (channels, samples), got {array.shape}.")
    if array.dtype.kind == "f" or array.size == 0:
        with np.errstate(over="ignore"):  # an overflow becomes infinite and is refused as such
            return array.astype(np.float32)
    if array.dtype.name in PCM_DTYPES:
        middle = 128 if array.dtype.name == "uint8" else 0
        return (array.astype(np.float32) - middle) / 2.0 ** (8 * array.dtype.itemsize - 1)
    raise TypeError(f"audio samples must be floating point or {'/'.join(PCM_DTYPES)} PCM, got {array.dtype}.")


def _decode(audio: str | os.PathLike | bytes | bytearray | memoryview, name: str, target_rate: int) -> np.ndarray:
    """Returns the mono samples `(n,)` at `target_rate`, float32, of an audio file, URL or bytes."""
    if isinstance(audio, str) and audio.startswith(("http://", "https://")):
        try:
            audio = get_session().get(audio, follow_redirects=True, timeout=60).raise_for_status().content
        except Exception as error:
            raise ValueError(f"audio cannot be fetched from {name}: {error}") from error
    if isinstance(audio, (str, os.PathLike)):
        if not Path(audio).exists():
            raise FileNotFoundError(f"audio file not found: {name}")
        source: Any = os.fspath(audio)
    else:
        source = BytesIO(audio)
        if not source.getbuffer().nbytes:
            raise ValueError(f"audio is empty: {name} holds no samples.")
    refuse_cut_wav(source, name)
    try:
        return _read(source, target_rate)
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError) as error:
        # ValueError: a FLAC written to a pipe, whose header does not say how long it is.
        return _decode_with_ffmpeg(audio, name, target_rate, error)


def refuse_cut_wav(source: str | BytesIO, name: str) -> None:
    """Raises a ValueError for a WAV file that ends before its samples do: soundfile would read what is there."""
    if isinstance(source, str) and not os.path.isfile(source):
        return  # a pipe can be read but once
    with open(source, "rb") if isinstance(source, str) else BytesIO(source.getbuffer()) as file:
        head, total = file.read(12), file.seek(0, os.SEEK_END)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return
        file.seek(len(head))
        while len(chunk := file.read(8)) == 8:
            size, there = int.from_bytes(chunk[4:], "little"), total - file.tell()
            if chunk[:4] == b"data":
                if there < size < STREAMED_BYTES:
                    raise ValueError(
                        f"audio is cut off: {name} holds {there} of the {size} bytes of samples that its header "
                        "names; record or fetch it again."
                    )
                return
            file.seek(size + size % 2, os.SEEK_CUR)


def _read(source: Any, target_rate: int) -> np.ndarray:
    """Returns the mono samples at `target_rate` of what soundfile reads, never holding all channels at their rate."""
    with soundfile.SoundFile(source) as file:
        blocks = (file.read(BLOCK, dtype="float32") for _ in count())
        return _mix_and_resample(takewhile(len, blocks), file.samplerate, target_rate)


def _decode_with_ffmpeg(audio: Any, name: str, target_rate: int, error: Exception) -> np.ndarray:
    """As `_decode`, for what soundfile refused with `error` (m4a, video, ...); damaged audio is refused."""
    if shutil.which("ffmpeg") is None:
        raise ValueError(
            f"audio cannot be read: soundfile cannot decode {name} ({error}); install ffmpeg for other formats."
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        file = audio
        if not isinstance(audio, (str, os.PathLike)):
            file = Path(folder, "input")  # not a pipe: ffmpeg must seek in mp4
            file.write_bytes(audio)
        wav = Path(folder, "output.wav")
        command = ["ffmpeg", "-nostdin", "-v", "error", "-xerror", "-i", f"file:{os.fspath(file)}", "-map", "0:a:0"]
        command += ["-c:a", "pcm_f32le", "-rf64", "auto", str(wav)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not wav.exists():
            reason = (done.stderr.strip().splitlines() or ["no audio found"])[-1]
            raise ValueError(f"audio cannot be read: neither soundfile nor ffmpeg can decode {name} ({reason}).")
        return _read(wav, target_rate)


def list_recordings(audio: Any) -> list:
    """Returns the recordings in `audio`, one or a list of them, nested or not, as a flat list."""
    if isinstance(audio, Sequence) and not isinstance(audio, (str, bytes, bytearray, memoryview)):
        if len(audio) and isinstance(audio[0], (int, float, np.number)):
            return [audio]  # the samples of one recording
        return [recording for item in audio for recording in list_recordings(item)]
    return [audio]


__all__ = ["list_recordings", "load_recording", "refuse_cut_wav"]
