"""Recordings of any kind: files, URLs, texts, bytes, arrays and parts of chats -> mono samples at 16 kHz."""

import base64
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
import soxr
import torch
from huggingface_hub import get_session
from transformers.utils import logging

from .decoding_fastlongspeech import decode_file, pcm_to_float
from .windows_fastlongspeech import WINDOWS

logger = logging.get_logger(__name__)

PCM_DTYPES = ("uint8", "int16", "int32")
SOURCE_KEYS = ("array", "audio", "bytes", "path", "url", "data", "audio_url", "input_audio")
BASE64 = re.compile(r"[A-Za-z0-9+/]{64,}={0,2}")  # shorter texts are names of files
CANCELLED = 0.01  # channels cancel if their mean has less of their power than this; of unrelated ones it has a half
FLOAT_PEAK = 32.0  # 30 dB over full scale: no recording is as loud, and none at the scale of integers as quiet
SCALES = (16, 24, 32)  # bits of the integers at whose scale floating-point samples may be written


def load_recording(audio: Any, sampling_rate: float | None = None, target_rate: int = 16000) -> np.ndarray:
    """Returns one recording as mono samples `(n,)`, float32, at `target_rate` hertz.

    Args:
        audio: one of

            - an audio or video file of any format that FFmpeg reads: its path (`~` is the home folder), its bytes, an
              http(s) or file URL, a `data:` URI or base64 text;
            - an array, tensor or list of samples, `(n,)`, `(channels, n)` or `(n, channels)`, floating point or
              uint8/int16/int32 PCM, alone or in a pair `(sampling_rate, array)` or `(array, sampling_rate)`;
            - a dictionary that has one of these: `{"array": ..., "sampling_rate": ...}`, `{"bytes": ..., "path": ...}`
              or an audio part of a chat, `{"audio" | "path" | "url" | "audio_url": ...}` or
              `{"input_audio": {"data": base64 text, "format": ...}}`;
            - a decoder of torchcodec.
        sampling_rate: hertz of an array that does not bring its own rate; files have theirs. An array without any is
            taken as `target_rate`, with a warning.
        target_rate: hertz of the result.

    Channels are averaged. Where that would cancel them one is taken, and floating-point samples at the scale of
    integers are scaled to 1; both with a warning.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: `audio` is none of the above or holds no real numbers.
        ValueError: the audio is unreadable, damaged, cut off, empty, not finite or shorter than one 40 ms frame, or
            the sampling rate is no positive number.
    """
    audio, sampling_rate, name = _find_source(audio, sampling_rate)
    if isinstance(audio, (str, os.PathLike, bytes, bytearray, memoryview)):
        blocks: Any = decode_file(audio, name)
    else:
        array = _to_float_samples(audio)
        if sampling_rate is None:
            logger.warning_once(
                f"audio was given as an array without a sampling rate and is taken as {target_rate} Hz; "
                "pass sampling_rate=... to say so or to have it resampled."
            )
            sampling_rate = target_rate
        rate = _check_sampling_rate(sampling_rate)
        if array.ndim == 2 and array.shape[0] < array.shape[1]:
            array = array.T  # there are fewer channels than samples
        blocks = [(rate, array)] if array.size else []
    samples = _mix_and_resample(blocks, target_rate, name)

    if samples.size == 0:
        raise ValueError(f"audio is empty: {name} holds no samples.")
    if not np.isfinite(samples).all():
        raise ValueError(f"audio must be finite, but {name} holds NaN or infinite samples.")
    if len(samples) < WINDOWS.frame_seconds * target_rate:
        raise ValueError(
            f"audio must last at least one 40 ms frame, but {name} lasts {1000 * len(samples) / target_rate:.1f} ms."
        )
    return np.ascontiguousarray(_to_full_scale(samples, name), dtype=np.float32)


def _find_source(audio: Any, sampling_rate: Any) -> tuple[Any, Any, str]:
    """Returns the path, bytes or array that `audio` is or holds, the rate that it brings and a name for messages."""
    while isinstance(audio, Mapping):
        key = next((key for key in SOURCE_KEYS if audio.get(key) is not None), None)
        if key is None:
            raise TypeError(
                'an audio dictionary must have "audio", "url", "data", "audio_url", "input_audio", '
                f'"array", "bytes" or "path", got the keys {sorted(audio)}.'
            )
        if audio.get("sampling_rate") is not None:
            sampling_rate = audio["sampling_rate"]
        audio = audio[key]
        if key == "data" and isinstance(audio, str) and audio[:5].lower() != "data:":
            return _from_base64(audio), sampling_rate, "base64 text"  # of a stranger, maybe: never a path
    if hasattr(audio, "get_all_samples"):
        decoded = audio.get_all_samples()
        return decoded.data, decoded.sample_rate, type(audio).__name__
    if _is_pair(audio):
        audio, sampling_rate = reversed(audio) if _is_number(audio[0]) else audio
    if isinstance(audio, str):
        source, name = _find_text(audio)
        return source, sampling_rate, name
    if isinstance(audio, os.PathLike):
        path = os.path.expanduser(os.fspath(audio))
        if not os.path.exists(path):
            raise FileNotFoundError(f"audio file not found: {audio}")
        return path, sampling_rate, str(audio)
    return audio, sampling_rate, type(audio).__name__


def _find_text(text: str) -> tuple[str | bytes, str]:
    """Returns the path or the bytes that a text stands for, and a name for messages that is not too long."""
    name = text if len(text) <= 200 else f"{text[:100]}... ({len(text)} characters)"
    scheme = text[: text.find(":")].lower() if ":" in text else ""
    if scheme == "data":
        kind, comma, content = text.partition(",")
        if not comma:
            raise ValueError(f"audio cannot be read: {name} has no comma, after which a data: URI has its content.")
        raw = unquote_to_bytes(content)
        return _from_base64(raw.decode("latin-1")) if kind.lower().endswith(";base64") else raw, f"{kind[:50]},..."
    if scheme in ("http", "https"):
        try:
            return get_session().get(text, follow_redirects=True, timeout=60).raise_for_status().content, name
        except Exception as error:
            raise ValueError(f"audio cannot be fetched from {name}: {error}") from error
    path = os.path.expanduser(text)
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"audio can only be read from files of this machine, but {name} names {parts.netloc}.")
        path = url2pathname(parts.path)
    elif text[len(scheme) :].startswith("://"):
        raise ValueError(f"an audio URL must begin with http, https, file or data, got {name}; download it first.")
    if os.path.exists(path):
        return path, name
    compact = "".join(text.splitlines())
    if BASE64.fullmatch(compact):
        return _from_base64(compact), "base64 text"
    raise FileNotFoundError(f"audio file not found: {name}")


def _from_base64(text: str) -> bytes:
    compact = "".join(text.split()).rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except ValueError as error:
        raise ValueError(f"audio cannot be read: the base64 text is damaged ({error}).") from error


def _is_number(value: Any) -> bool:
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim == 0
    return isinstance(value, (int, float, np.number))


def _is_pair(audio: Any) -> bool:
    """Whether it is an array of samples with its sampling rate, in one order or the other."""
    if not isinstance(audio, (list, tuple)) or len(audio) != 2 or _is_number(audio[0]) == _is_number(audio[1]):
        return False
    array = audio[1] if _is_number(audio[0]) else audio[0]
    return isinstance(array, (np.ndarray, torch.Tensor, list, tuple))


def _check_sampling_rate(sampling_rate: Any) -> float:
    if isinstance(sampling_rate, (torch.Tensor, np.ndarray)) and sampling_rate.ndim == 0:
        sampling_rate = sampling_rate.item()
    real = isinstance(sampling_rate, (int, float, np.integer, np.floating)) and not isinstance(sampling_rate, bool)
    if not real or not 0 < sampling_rate < float("inf"):
        raise ValueError(f"sampling_rate must be a positive number of hertz, got {sampling_rate!r}.")
    return sampling_rate


def _mix_and_resample(blocks: Iterable[tuple[float, np.ndarray]], target_rate: int, name: str) -> np.ndarray:
    """Returns the mono samples at `target_rate` of consecutive blocks `(n,)` or `(n, channels)`, float32."""
    parts, one_taken = [], False
    for rate, run in groupby(blocks, lambda block: block[0]):
        resampler = soxr.ResampleStream(rate, target_rate, 1, dtype="float32", quality="HQ")
        for _, block in run:
            mono, cancelled = _mix(block)
            one_taken |= cancelled
            parts.append(mono if rate == target_rate else resampler.resample_chunk(mono))
        if rate != target_rate:
            parts.append(resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
    if one_taken:
        logger.warning(f"the channels of {name} cancel each other, as if one were inverted; one of them is taken.")
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, dtype=np.float32)])


def _mix(samples: np.ndarray) -> tuple[np.ndarray, bool]:
    """Returns the mean of the channels, or one of them where the mean would cancel them, and whether it would."""
    if samples.ndim == 1:
        return samples, False
    mono = samples.mean(axis=1)
    powers = np.einsum("nc,nc->c", samples, samples)
    if np.dot(mono, mono) >= CANCELLED * powers.mean() or not np.isfinite(powers).all():
        return mono, False
    # The first that is not silent, so that neighbouring blocks take the same.
    return samples[:, int(np.argmax(powers >= powers.max() / 2))], True


def _to_full_scale(samples: np.ndarray, name: str) -> np.ndarray:
    """Returns samples whose full scale is 1, if it is not; a few that are far beyond are clicks."""
    peak = float(np.abs(samples).max())
    if peak <= FLOAT_PEAK or np.mean(np.abs(samples) > 1) < 0.01:
        return samples
    for bits in SCALES:
        if peak < 2.0**bits:  # twice full scale
            logger.warning(f"{name} has samples up to {peak:.0f}: they are scaled to 1, as {bits}-bit integers are.")
            return samples / np.float32(2.0 ** (bits - 1))
    raise ValueError(f"audio must have samples of at most 1, but {name} has some up to {peak:.0e}; scale them to 1.")


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
    if array.dtype.kind == "f" or array.size == 0 or array.dtype.name in PCM_DTYPES:
        return pcm_to_float(array)
    raise TypeError(f"audio samples must be floating point or {'/'.join(PCM_DTYPES)} PCM, got {array.dtype}.")


def list_recordings(audio: Any) -> list:
    """Returns the recordings in `audio`, one or a list of them, nested or not, as a flat list."""
    if isinstance(audio, Sequence) and not isinstance(audio, (str, bytes, bytearray, memoryview)):
        if _is_pair(audio) or (len(audio) and _is_number(audio[0])):
            return [audio]  # the samples of one recording, with their sampling rate or without
        return [recording for item in audio for recording in list_recordings(item)]
    return [audio]


__all__ = ["SOURCE_KEYS", "list_recordings", "load_recording"]
