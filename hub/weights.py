"""Weights as they lie on a disk: read one at a time, and written shard by shard so that a killed run goes on."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..recordings_fastlongspeech import save_whole


class StoredWeights:
    """The safetensors of a folder, whole or in shards. Nothing is read before it is asked for.

    Args:
        folder: where they lie.
        stem: what their files' names begin with: `"model"` or `"adapter_model"`.

    Attributes:
        shapes: the shape of every weight by its name.
        dtype: the name of the type of the largest weight, such as `"bfloat16"`.

    Raises:
        ValueError: there are none, or a file of theirs is missing or damaged.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.folder = folder
        index = folder / f"{stem}.safetensors.index.json"
        names = {f"{stem}.safetensors"}
        if index.exists():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        elif not (folder / f"{stem}.safetensors").exists():
            raise ValueError(
                f"{folder} holds no {stem}.safetensors; weights in another form must be saved as safetensors first, "
                "by save_pretrained of transformers or peft."
            )
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files = {}
        for file_name in sorted(names):
            try:
                file = safe_open(folder / file_name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{folder / file_name} can't be read: {error}; fetch it again.") from error
            for name in file.keys():
                self.shapes[name] = tuple(file.get_slice(name).get_shape())
                self._files[name] = file

        largest = max(self.shapes, key=lambda name: math.prod(self.shapes[name]))
        self.dtype = str(self.read(largest).dtype).removeprefix("torch.")

    def read(self, name: str) -> Tensor:
        """Returns a weight."""
        return self._files[name].get_tensor(name)


def write_shards(
    folder: Path,
    shapes: dict[str, torch.Size],
    make: Callable[[str], Tensor],
    dtype: torch.dtype,
    shard_size: str,
) -> None:
    """Writes weights into shards and their index, with those of one shard in memory at a time.

    A shard that is there already, whole, is kept.

    Args:
        folder: where to.
        shapes: the shape of every weight, in the order to write them.
        make: returns a weight by its name.
        dtype: the type that all are written in.
        shard_size: of each file at most, such as `"5GB"`.
    """
    shells = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(shells, max_shard_size=shard_size)
    with tqdm(total=len(shapes), desc="writing", unit="weight", delay=1) as bar:
        for file_name, names in split.filename_to_tensors.items():
            path = folder / file_name
            if not _is_whole(path, {name: shells[name] for name in names}):
                weights = {}
                for name in names:
                    weights[name] = make(name).to(dtype).contiguous()
                    bar.update()
                save_whole(weights, path, {"format": "pt"})
            else:
                bar.update(len(names))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _is_whole(path: Path, shells: dict[str, Tensor]) -> bool:
    """Tells whether a file holds these weights; it has its name only since it was written to its end."""
    if not path.exists():
        return False
    with safe_open(path, framework="pt") as file:
        return set(file.keys()) == set(shells) and all(
            tuple(file.get_slice(name).get_shape()) == tuple(shell.shape) for name, shell in shells.items()
        )


__all__ = ["StoredWeights", "write_shards"]
