"""Weights that lie apart in a checkpoint and are one in the model, such as those of experts."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key


@dataclass(frozen=True)
class Joined:
    """How transformers makes one weight of several.

    Attributes:
        name: what it is called in the model.
        parts: the weights it is made of as the checkpoint calls them, each with the pattern that its name fits.
        converter: transformers' own.
    """

    name: str
    parts: list[tuple[str, str]]
    converter: WeightConverter

    def make(self, read: Callable[[str], Tensor]) -> Tensor:
        """Returns the weight.

        Args:
            read: returns a weight of the checkpoint by its name there.

        Raises:
            ValueError: the parts do not fit each other.
        """
        converter: Any = copy.deepcopy(self.converter)
        for pattern, part in self.parts:
            converter.add_tensor(self.name, part, pattern, read(part))
        try:
            return converter.convert(self.name)[self.name]
        except RuntimeError as error:
            raise ValueError(
                f"the source's {len(self.parts)} parts of {self.name} do not fit each other: {error}; fetch it again."
            ) from error

    def shape(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Returns the shape of the weight by those of the checkpoint's."""
        return tuple(self.make(lambda part: torch.empty(shapes[part], device="meta")).shape)


def find_joined(model: Any, names: dict[str, str]) -> dict[str, Joined]:
    """Returns the weights of a model that a checkpoint has in parts, by their names.

    Args:
        model: of ours.
        names: of the checkpoint's weights, in the form that ours have, and what the checkpoint calls them.
    """
    converters = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightConverter)]
    ours = {name for name, _ in model.named_parameters()}
    joined: dict[str, Joined] = {}
    for name in sorted(names, key=dot_natural_key):
        for converter in converters if name not in ours else ():
            whole, pattern = converter.rename_source_key(name)
            if pattern is not None and whole in ours:
                joined.setdefault(whole, Joined(whole, [], converter)).parts.append((pattern, names[name]))
                break
    return joined


__all__ = ["Joined", "find_joined"]
