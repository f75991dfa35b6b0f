"""Encoded recordings: every frame that the encoder has made of them, to be asked about any number of times."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "fastlongspeech recordings 1"
TENSORS = ("frames", "starts", "ends", "lengths")
SAMPLED = 64  # values of each weight that a fingerprint reads


def save_whole(tensors: dict[str, Tensor], path: str | os.PathLike, metadata: dict[str, str]) -> None:
    """Writes a safetensors file; what is there already is replaced when all is written.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"path {os.fspath(path)} is in a folder that does not exist; make {folder} first.")
    unfinished = f"{os.fspath(path)}.unfinished"
    save_file(tensors, unfinished, metadata=metadata)
    os.replace(unfinished, path)


@dataclass(frozen=True)
class EncodedRecordings:
    """Every frame of A recordings, one recording after the other, as `encode` returns them.

    `len` is A; `recordings[i]`, `recordings[1:3]` and `recordings[[0, 0, 2]]` are some of them.

    Attributes:
        frames: `(N, D)`, frames before the encoder's last normalisation, 25 a second with Qwen2-Audio.
        starts: `(N,)` float64 on the CPU, the second of its recording that each frame begins at.
        ends: `(N,)` float64 on the CPU, the second that each frame ends at.
        lengths: `(A,)` int64 on the CPU, the frames of each recording.
        encoder: a fingerprint of the encoder that made the frames; None where nobody asked for it.
        audio: a fingerprint of what was heard, one for each recording; empty where nobody asked for it.
    """

    frames: Tensor
    starts: Tensor
    ends: Tensor
    lengths: Tensor
    encoder: str | None = None
    audio: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int | slice | Sequence[int]) -> "EncodedRecordings":
        numbers = np.atleast_1d(np.arange(len(self))[index])
        parts = {name: getattr(self, name).split(self.lengths.tolist()) for name in TENSORS[:3]}
        chosen: dict[str, Any] = {
            name: torch.cat([of_each[number] for number in numbers]) for name, of_each in parts.items()
        }
        audio = tuple(self.audio[number] for number in numbers) if self.audio else ()
        return replace(self, lengths=self.lengths[torch.from_numpy(numbers)], audio=audio, **chosen)

    @classmethod
    def cat(cls, recordings: Iterable["EncodedRecordings"]) -> "EncodedRecordings":
        """Returns recordings of the same encoder in one.

        Raises:
            ValueError: there are none, or they were made by different encoders.
        """
        recordings = list(recordings)
        encoders = {part.encoder for part in recordings}
        if len(encoders) != 1:
            raise ValueError(f"recordings must be of one encoder to be joined, got those of {len(encoders)}.")
        joined = {name: torch.cat([getattr(part, name) for part in recordings]) for name in TENSORS}
        return cls(**joined, encoder=encoders.pop(), audio=sum((part.audio for part in recordings), ()))

    def pieces(self, seconds: float) -> "EncodedRecordings":
        """Returns pieces of so many seconds, each as a recording of its own; one without a frame is left out.

        The times stay those of the whole recording. What was heard has no fingerprint any more.
        """
        recording_of = torch.arange(len(self)).repeat_interleave(self.lengths)
        piece_of = torch.stack((recording_of, (self.starts / seconds).floor().long()), dim=1)
        return replace(self, lengths=piece_of.unique_consecutive(dim=0, return_counts=True)[1], audio=())

    def to(self, *args: Any, **kwargs: Any) -> "EncodedRecordings":
        """Returns the same recordings with their frames moved or cast, as by `Tensor.to`."""
        return replace(self, frames=self.frames.to(*args, **kwargs))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the recordings into a safetensors file; see `save_whole`."""
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in TENSORS}
        made_by = {"format": FORMAT, "encoder": json.dumps(self.encoder), "audio": json.dumps(self.audio)}
        save_whole(tensors, path, made_by)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "EncodedRecordings":
        """Returns the recordings that `save` wrote into a file, on the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something else.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"encoded recordings were not found: {os.fspath(path)} is no file.")
        try:
            with safe_open(path, framework="pt") as file:
                made_by = file.metadata() or {}
                if made_by.get("format") != FORMAT:
                    raise ValueError(f"{os.fspath(path)} holds no encoded recordings; write them with save().")
                tensors = {name: file.get_tensor(name) for name in TENSORS}
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(path)} can't be read as encoded recordings: {error}.") from error
        return cls(**tensors, encoder=json.loads(made_by["encoder"]), audio=tuple(json.loads(made_by["audio"])))


@torch.no_grad()
def fingerprint_weights(module: nn.Module) -> str:
    """Returns a text that is the same for the same weights on any device, in float32 or bfloat16 alike.

    It reads `SAMPLED` values of every parameter, evenly spread: training moves them all, and a second question should
    not wait for a checksum of a gigabyte. Where weights are not there to be read (on the meta device) it reads shapes.
    """
    digest = hashlib.blake2b(digest_size=16)
    values = []
    for name, weight in module.named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if not weight.is_meta:
            # torchao's own tensors can't be flattened
            plain = weight.dequantize() if hasattr(weight, "__tensor_flatten__") else weight
            flat = plain.detach().flatten()
            values.append(flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].bfloat16())
    if values:
        device = values[0].device
        digest.update(torch.cat([value.to(device) for value in values]).float().cpu().numpy().tobytes())
    return digest.hexdigest()


def fingerprint_audio(
    input_features: Tensor, mel_frames: np.ndarray, windows_per_audio: np.ndarray
) -> tuple[str, ...]:
    """Returns a text for each recording that is the same for the same mel features.

    Args:
        input_features: log-mel windows `(W, mels, T)`.
        mel_frames: `(W,)` integer, mel frames of each window that hold audio.
        windows_per_audio: `(A,)` integer, windows of each recording.
    """
    prints, window = [], 0
    for count in windows_per_audio:
        digest = hashlib.blake2b(digest_size=16)
        for number in range(window, window + int(count)):
            valid = input_features[number, :, : int(mel_frames[number])]
            digest.update(valid.detach().float().cpu().contiguous().numpy().tobytes())
        prints.append(digest.hexdigest())
        window += int(count)
    return tuple(prints)


__all__ = ["EncodedRecordings", "fingerprint_audio", "fingerprint_weights"]
