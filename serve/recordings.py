"""Recordings that clients have sent: read, checked, encoded once, and kept by their content.

A second question about the same recording costs neither decoding nor encoding, as it is found by the SHA-256 of its
bytes. What was used least recently goes first when the room is used up.
"""

import base64
import binascii
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname
from weakref import WeakValueDictionary

import torch
from huggingface_hub import get_session

from ..audio_fastlongspeech import load_recording
from ..recordings_fastlongspeech import EncodedRecordings
from .door import HungUp


class Recording:
    """A recording that a client has sent.

    Attributes:
        name: the SHA-256 of its bytes.
        seconds: how long it lasts.
        frames: how many the encoder makes of it.
        features: the model's inputs, until it is encoded.
        encoded: its frames on the CPU, once it is.
    """

    def __init__(self, name: str, seconds: float, frames: int, features: Mapping[str, torch.Tensor]) -> None:
        self.name, self.seconds, self.frames = name, seconds, frames
        self.features: Mapping[str, torch.Tensor] | None = features
        self.encoded: EncodedRecordings | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that its frames and their times take."""
        assert self.encoded is not None
        return self.encoded.frames.nbytes + self.encoded.starts.nbytes + self.encoded.ends.nbytes


class Recordings:
    """The recordings of a server.

    Args:
        processor: a FastLongSpeech's.
        max_bytes: of a recording that is fetched from a URL.
        keep_bytes: room for recordings between requests; 0 keeps none.
        folder: the one folder of this machine whose files clients may name; None: no file.
    """

    def __init__(self, processor: Any, max_bytes: int, keep_bytes: int, folder: Path | None = None) -> None:
        self.processor = processor
        self.max_bytes, self.keep_bytes = max_bytes, keep_bytes
        self.folder = None if folder is None else folder.resolve()
        self._kept: OrderedDict[str, Recording] = OrderedDict()
        # Those that wait to be encoded, as long as a request waits with them.
        self._waiting: WeakValueDictionary[str, Recording] = WeakValueDictionary()
        self._lock = threading.Lock()

    def take(self, content: bytes) -> Recording:
        """Returns the recording that bytes of an audio file hold: a kept one, or a new one that is not encoded yet.

        Raises:
            ValueError: the bytes can't be read as audio.
        """
        name = hashlib.sha256(content).hexdigest()
        with self._lock:
            if known := self._find(name):
                return known
        windows = self.processor.windows
        rate = windows.sampling_rate
        try:
            samples = load_recording(content, target_rate=rate)
        except (OSError, TypeError) as error:
            raise ValueError(f"audio cannot be read: {error}") from error
        features = dict(self.processor(audio=samples, sampling_rate=rate))
        mel_frames = features["feature_attention_mask"].sum(1).numpy()
        frames = int(windows.place(mel_frames, features["windows_per_audio"].numpy()).lengths[0])
        with self._lock:  # another client may have brought the same meanwhile
            recording = self._find(name) or Recording(name, len(samples) / rate, frames, features)
            if recording.encoded is None:
                self._waiting[name] = recording
        return recording

    def encode(self, recording: Recording, model: Any, gone: threading.Event) -> EncodedRecordings:
        """Returns a recording's frames, encoded now if it has not been; called by one thread alone.

        Raises:
            HungUp: the client is gone before all of it is encoded.
        """
        if recording.encoded is None:

            def look(module: Any, arguments: Any) -> None:
                if gone.is_set():
                    raise HungUp

            hook = model.get_encoder("audio").register_forward_pre_hook(look)
            try:
                inputs = {name: tensor.to(model.device) for name, tensor in (recording.features or {}).items()}
                recording.encoded = model.encode(**inputs).to("cpu")
            finally:
                hook.remove()
            recording.features = None
            with self._lock:
                self._waiting.pop(recording.name, None)
                self._kept[recording.name] = recording
                # What was used least recently goes first; requests that work with it have it still.
                while self._kept and sum(one.nbytes for one in self._kept.values()) > self.keep_bytes:
                    self._kept.popitem(last=False)
        return recording.encoded

    def read(self, part: Mapping[str, Any]) -> bytes:
        """Returns the bytes of the audio file that a part of a chat holds or names.

        Args:
            part: of the type `input_audio` (base64 or a data URI in `data`) or `audio_url` (data, http or https, or a
                file of the allowed folder).

        Raises:
            ValueError: it can't be had; the sentence says why.
        """
        inner = part.get(str(part.get("type")))
        given = inner.get("data") or inner.get("url") if isinstance(inner, Mapping) else inner
        if not isinstance(given, str) or not given:
            raise ValueError(
                f"a part of the type {part.get('type')!r} must hold audio as text, got {type(given).__name__}."
            )
        scheme = urlsplit(given[:200]).scheme.lower()
        if scheme == "data":
            kind, comma, content = given.partition(",")
            if not comma:
                raise ValueError("audio cannot be read: a data URL must have a comma before its content.")
            return _from_base64(content) if kind.lower().endswith(";base64") else unquote_to_bytes(content)
        if part["type"] == "input_audio":
            return _from_base64(given)
        if scheme in ("http", "https"):
            return self._fetch(given)
        return self._read_file(given, scheme)

    def _find(self, name: str) -> Recording | None:
        """Returns a recording that is known, used from now on as the latest."""
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        return self._waiting.get(name)

    def _read_file(self, given: str, scheme: str) -> bytes:
        path = Path(url2pathname(urlsplit(given).path) if scheme == "file" else given)
        if self.folder is None:
            raise ValueError(
                "files of the server are not read for clients; send the recording itself, or start the server with "
                "--allow-folder."
            )
        try:
            path = (self.folder / path).resolve()  # links are followed first, so that none leads out
            found = path.is_relative_to(self.folder) and path.is_file()
        except OSError:  # a name that is too long
            found = False
        if not found:
            raise ValueError(f"the folder that clients may read holds no such recording: {given[:200]}.")
        return path.read_bytes()

    def _fetch(self, url: str) -> bytes:
        content = bytearray()
        try:
            with get_session().stream("GET", url, follow_redirects=True, timeout=60) as response:
                response.raise_for_status()
                for block in response.iter_bytes():
                    content += block
                    if len(content) > self.max_bytes:
                        break
        except Exception as error:
            raise ValueError(f"audio cannot be fetched from {url[:200]}: {error}") from error
        if len(content) > self.max_bytes:
            raise ValueError(f"audio from {url[:200]} is larger than the {self.max_bytes // 2**20} MB that are taken.")
        return bytes(content)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"audio cannot be read: the base64 text is damaged ({error}).") from error


__all__ = ["Recording", "Recordings"]
