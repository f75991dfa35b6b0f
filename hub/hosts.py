"""What a conversion has to know of a host beyond `app/hosts.py`: its names, and its own class in transformers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..app.hosts import host_of


@dataclass(frozen=True)
class Host:
    """A kind of checkpoint, and what it becomes.

    Attributes:
        names: regular expressions of the names that its parameters may have, and what our names begin with instead.
        config, model, processor: our classes.
        stock: the class of transformers that reads the same checkpoint without our code.
        audio_tower, projector: the paths of these parts in the stock model; the tower's `layer_norm` is its last step.
    """

    names: Mapping[str, str]
    config: Any
    model: Any
    processor: Any
    stock: Any
    audio_tower: str = "model.audio_tower"
    projector: str = "model.multi_modal_projector"

    def rename(self, name: str) -> str:
        """Returns our name of a parameter."""
        for pattern, replacement in self.names.items():
            if re.search(pattern, name):
                return re.sub(pattern, replacement, name)
        return name

    def load_stock(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        """Returns the checkpoint as transformers' own class reads it; a CTC decoder is left out."""
        kind = self.stock
        fields, _ = kind.config_class.get_config_dict(folder)
        # Of a model of several parts, such as a full Omni, the part that `kind` reads.
        parts = (part for part in fields.values() if isinstance(part, dict))
        wanted = kind.config_class.model_type
        fields = next((part for part in parts if part.get("model_type") == wanted), fields)
        config: Any = kind.config_class.from_dict({**fields, "model_type": kind.config_class.model_type})
        return kind.from_pretrained(folder, config=config, dtype=dtype).eval()


def find_host(model_type: str | None, where: str) -> Host:
    """Returns what is known of a `model_type`.

    Raises:
        ValueError: nothing is, or the transformers that is installed lacks it.
    """
    try:
        host = host_of({"model_type": model_type})
    except ValueError as error:
        raise ValueError(f"{where} can't be converted: {error}") from error
    config, model, processor = host.load()
    return Host(model.key_mapping, config, model, processor, stock=model.__bases__[-1])


__all__ = ["Host", "find_host"]
