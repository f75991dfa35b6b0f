"""A cache on disk of the frames that a frozen encoder makes: later epochs, lengths and rivals skip the encoder.

Frames are found by what was heard and by who heard it: the samples of a recording, and the encoder's weights, its mel
features and its precision. They are kept in bfloat16. A frame that was just encoded is rounded as well, so that a run
sees the same frames whatever the cache holds.

    FOLDER/ENCODER/WRITER.safetensors    a shard: one tensor `(N, D)` for each recording, and its checksum

Every process writes shards of its own, under another name until they are whole. So any number of processes and runs
may share a folder. A shard that is damaged is set aside with a warning, and its recordings are encoded again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import ProcessorMixin, TrainerCallback
from transformers.utils import logging

from ..audio_fastlongspeech import load_recording
from ..recordings_fastlongspeech import EncodedRecordings, save_whole
from ..windows_fastlongspeech import Windows

logger = logging.get_logger(__name__)

SHARD_BYTES = 2**28  # of one shard; also the most that a killed process has to encode again
ABANDONED_SECONDS = 3600.0  # no shard takes as long to write
MISSING = "missing_recordings"


class FeatureCache:
    """The frames of one encoder in a cache folder.

    Args:
        folder: of the cache; made if it does not exist.
        encoder: a text that names weights, mel features and precision, see `describe_encoder`.
        width: of a frame.
        limit_bytes: no shard is added to a folder that would grow beyond this. Nothing is ever deleted.

    Attributes:
        read, encoded: recordings that were found and that had to be encoded, in batches of this process.
    """

    def __init__(self, folder: str | os.PathLike, encoder: str, width: int, limit_bytes: float) -> None:
        self.root, self.folder = Path(folder), Path(folder, encoder)
        self.width, self.limit_bytes = width, limit_bytes
        self.read = self.encoded = 0
        self.full = False
        self._shard_of: dict[str, Path] = {}
        self._known: set[str] = set()
        self._pending: dict[str, Tensor] = {}
        self._scanned_at = -1
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()
        self._scan()

    def listen(self, processor: Any, audio: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns what the processor and then the model take for recordings, those that are cached without features.

        Args:
            processor: makes the features of those that are not.
            audio: recordings as `load_recording` takes them.

        Returns:
            `recordings` for the processor. For the model the same, `(N, D)` frames in bfloat16 with zeros where they
            are missing, and beside it the features of the missing ones and their numbers; see `complete`.
        """
        windows: Windows = processor.windows
        samples = [load_recording(recording) for recording in audio]
        keys = tuple(hashlib.blake2b(recording.tobytes(), digest_size=16).hexdigest() for recording in samples)
        mel_frames = [windows.mel_frames(len(recording)) for recording in samples]
        places = windows.place(np.concatenate(mel_frames), np.array([len(of_one) for of_one in mel_frames]))
        frames = torch.zeros(len(places.starts), self.width, dtype=torch.bfloat16)
        missing = []
        for number, (key, part) in enumerate(zip(keys, frames.split(places.lengths.tolist()), strict=True)):
            found = self.get(key, len(part))
            if found is None:
                missing.append(number)
            else:
                part.copy_(found)
        recordings = EncodedRecordings(
            frames=frames,
            starts=torch.from_numpy(windows.seconds(places.starts)),
            ends=torch.from_numpy(windows.seconds(places.ends)),
            lengths=torch.from_numpy(places.lengths),
            audio=keys,
        )
        of_model: dict[str, Any] = {"recordings": recordings, MISSING: torch.tensor(missing, dtype=torch.int64)}
        if missing:
            rate = windows.sampling_rate
            of_model |= processor(audio=[samples[number] for number in missing], sampling_rate=rate)
        return {"recordings": recordings}, of_model

    @torch.no_grad()
    def complete(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Returns a batch of `listen` with its missing frames encoded by `model` and kept; features are gone."""
        missing = inputs[MISSING].tolist()
        features = ("input_features", "feature_attention_mask", "windows_per_audio")
        recordings = inputs["recordings"]
        like = next(model.audio_tower.parameters())
        frames = recordings.frames.to(like.device)
        if missing:
            encoded = model._encode(*(inputs[name] for name in features)).frames.to(frames)
            parts = frames.split(recordings.lengths.tolist())
            lengths = recordings.lengths[missing].tolist()
            for number, part in zip(missing, encoded.split(lengths), strict=True):
                parts[number].copy_(part)
                self.put(recordings.audio[number], part)
        self.read += len(recordings) - len(missing)
        self.encoded += len(missing)
        rest = {name: value for name, value in inputs.items() if name not in (*features, MISSING)}
        whole = EncodedRecordings(frames.to(like.dtype), recordings.starts, recordings.ends, recordings.lengths)
        return rest | {"recordings": whole}

    def get(self, key: str, length: int) -> Tensor | None:
        """Returns the frames `(length, D)` of a recording, bfloat16, or None where they have to be encoded."""
        if key in self._pending:
            return self._pending[key]
        if key not in self._shard_of:
            self._scan()  # another process may have written it
        path = self._shard_of.get(key)
        if path is None:
            return None
        try:
            with safe_open(path, framework="pt") as shard:
                frames = shard.get_tensor(key)
                sound = checksum(frames) == json.loads(shard.metadata()["checksums"])[key]
        except (SafetensorError, OSError) as error:
            self._set_aside(path, str(error))
            return None
        if not sound or frames.shape != (length, self.width):
            self._set_aside(path, "its frames are not those that were written")
            return None
        return frames

    def put(self, key: str, frames: Tensor) -> None:
        """Keeps the frames `(N, D)` of a recording in memory until there are enough for a shard, or `flush`."""
        if self.full or key in self._pending or key in self._shard_of:
            return
        self._pending[key] = frames.to("cpu", torch.bfloat16, copy=True)
        if sum(part.nbytes for part in self._pending.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what is in memory into a shard, unless the folder is full."""
        size = sum(part.nbytes for part in self._pending.values())
        held = sum(path.stat().st_size for path in self.root.glob("*/*.safetensors")) if size else 0
        if size and held + size > self.limit_bytes:
            self.full = True
            logger.warning(
                f"The feature cache {self.root} holds {held / 1e9:.1f} GB, and its limit is "
                f"{self.limit_bytes / 1e9:.1f} GB: what is not in it is encoded every time. Delete folders of "
                "encoders that you no longer use, or raise feature_cache_gb."
            )
        elif size:
            sums = json.dumps({key: checksum(frames) for key, frames in self._pending.items()})
            path = self.folder / f"{uuid.uuid4().hex}.safetensors"
            save_whole(self._pending, path, {"format": "pt", "checksums": sums})
        self._pending = {}
        self._scan()

    def _scan(self) -> None:
        """Reads the names of the recordings in shards that were added since the last time."""
        changed = self.folder.stat().st_mtime_ns
        if changed == self._scanned_at:
            return
        for path in self.folder.glob("*.safetensors"):
            if path.name not in self._known:
                self._known.add(path.name)
                try:
                    with safe_open(path, framework="pt") as shard:
                        self._shard_of |= dict.fromkeys(shard.keys(), path)
                except (SafetensorError, OSError) as error:
                    self._set_aside(path, str(error))
        self._scanned_at = changed

    def _set_aside(self, path: Path, reason: str) -> None:
        self._shard_of = {key: shard for key, shard in self._shard_of.items() if shard != path}
        try:
            os.replace(path, path.with_suffix(".damaged"))
        except FileNotFoundError:
            pass  # another process was first
        logger.warning(
            f"The feature cache has a damaged shard, {path} ({reason}). It is set aside as .damaged, where it can be "
            "deleted; its recordings are encoded again."
        )

    def _remove_abandoned(self) -> None:
        for path in self.folder.glob("*.unfinished"):
            try:
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()
                    logger.warning(f"The feature cache removed {path}, which a process that was killed has left.")
            except FileNotFoundError:
                pass  # whole by now, or removed by another process


def checksum(frames: Tensor) -> int:
    """Returns the CRC-32 of frames in bfloat16."""
    return zlib.crc32(frames.contiguous().view(torch.int16).numpy().data)


def describe_encoder(model: Any, processor: ProcessorMixin, precision: str) -> str:
    """Returns a text that is the same where the same samples become the same frames.

    Raises:
        ValueError: the encoder trains, so that its frames change with every step.
    """
    if any(weight.requires_grad for weight in model.audio_tower.parameters()):
        raise ValueError("feature_cache needs a frozen encoder, but this one trains; leave feature_cache out.")
    features = json.dumps(processor.feature_extractor.to_dict(), sort_keys=True)  # type: ignore[attr-defined]
    made_of = [model.fingerprint(), features, precision]
    return hashlib.blake2b("\n".join(made_of).encode(), digest_size=16).hexdigest()


class FlushFeatures(TrainerCallback):
    """Writes what the cache has in memory at every checkpoint, after every epoch and at the end."""

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.cache.flush()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.cache.flush()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.cache.flush()
