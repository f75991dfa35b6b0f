"""LoRA adapters as PEFT stores them: merged into weights one at a time, or kept under the names of our model."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .hosts import Host
from .weights import StoredWeights

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
# Settings under which an adapter is more than two matrices beside a weight, and their value where it is not.
PLAIN = {
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "trainable_token_indices": None,
    "layer_replication": None,
    "target_parameters": None,
}


class Adapter:
    """A LoRA adapter in a folder.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        host: whose names its weights may have.
        shapes: the shapes of our model's weights.

    Attributes:
        targets: our names of the weights that it changes, and for each its two matrices' names in the file.

    Raises:
        ValueError: it is no plain LoRA adapter, or it does not fit the model.
    """

    def __init__(self, folder: Path, host: Host, shapes: dict[str, Any]) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if self.settings.get("peft_type") != "LORA":
            raise ValueError(f"{folder} is an adapter of the type {self.settings.get('peft_type')}; give a LoRA one.")
        for name, plain in PLAIN.items():
            if (value := self.settings.get(name)) and value != plain:
                raise ValueError(
                    f"{folder / CONFIG} sets {name} to {value!r}, which can't be converted; merge by PEFT."
                )
        self.weights = StoredWeights(folder, "adapter_model")
        self.targets: dict[str, dict[str, str]] = {}
        for name in self.weights.shapes:
            module, matrix = self._place(name)
            target = host.rename(f"{module}.weight")
            if target not in shapes:
                raise ValueError(f"{folder} changes {target}, which the model does not have; it is of another model.")
            self.targets.setdefault(target, {})[matrix] = name
        for target, pair in self.targets.items():
            found = {matrix: self.weights.shapes[name] for matrix, name in pair.items()}
            rows, columns = shapes[target]
            rank = self.settings["r"]
            if found != {"lora_A": (rank, columns), "lora_B": (rows, rank)}:
                raise ValueError(f"{folder} has {found} for {target}, {rows} x {columns}, at rank {rank}.")

    @property
    def scale(self) -> float:
        """What the product of both matrices is multiplied by."""
        rank, alpha = self.settings["r"], self.settings["lora_alpha"]
        return alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """Returns a weight with what the adapter adds to it, float32, or as it is where that is nothing."""
        if name not in self.targets:
            return weight
        left, right = (self.weights.read(self.targets[name][matrix]).float() for matrix in ("lora_B", "lora_A"))
        return weight.float() + self.scale * (left @ right)

    def save(self, folder: Path, base: str) -> None:
        """Writes the adapter for our model `base`, a folder or Hub id, in the form that PEFT loads."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {}
        for target, pair in self.targets.items():
            module = target.removesuffix(".weight")
            for matrix, name in pair.items():
                weights[f"{PREFIX}{module}.{matrix}.weight"] = self.weights.read(name).contiguous()
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = {
            **self.settings,
            "base_model_name_or_path": base,
            "revision": None,
            "auto_mapping": None,
            "task_type": "CAUSAL_LM",
            "target_modules": sorted(target.removesuffix(".weight") for target in self.targets),
            "inference_mode": True,
        }
        (folder / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")

    def _place(self, name: str) -> tuple[str, str]:
        """Returns the module that a weight of the file stands beside, and which of the two matrices it is."""
        parts = name.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".default").rpartition(".")
        if parts[2] not in ("lora_A", "lora_B"):
            raise ValueError(f"{self.folder} holds {name}, which is no part of a LoRA adapter of linear layers.")
        return parts[0], parts[2]


def is_adapter(folder: Path) -> bool:
    """Tells whether a folder holds an adapter, and not a model, which may have one beside its weights."""
    return (folder / CONFIG).exists() and not (folder / "config.json").exists()


__all__ = ["Adapter", "is_adapter"]
