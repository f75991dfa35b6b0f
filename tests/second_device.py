"""A second device for machines without an accelerator: tensors that say they are elsewhere, computed on the CPU.

torch itself takes no care where tensors without a GPU lie. Inside `SecondDevice()` it does: an operation on tensors of
both devices is an error, as on a GPU, and what a GPU would make the host wait for is noted.
"""

import traceback
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device(
    "cpu", 1
)  # torch accepts the name; tensors without a second device are on "cpu", without a number
aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
READING = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default)


class SecondDeviceTensor(Tensor):
    """Holds its values in `held`, an ordinary tensor."""

    held: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "SecondDeviceTensor":
        with _disable_current_modes():
            shape = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")
        tensor = Tensor._make_subclass(cls, shape, False, dispatch_device=True, device_for_backend_keys=DEVICE)
        tensor.held = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.prim.device.default:
            return DEVICE
        raise RuntimeError(f"{func} outside SecondDevice().")


class SecondDevice(TorchDispatchMode):
    """Computes on both devices; `waits` are the lines of our code where the host waited for the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return DEVICE if isinstance(args[0], SecondDeviceTensor) else args[0].device
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [isinstance(tensor, SecondDeviceTensor) for tensor in tensors]
        target = any(there)
        if kwargs.get("device") is not None:
            target, kwargs["device"] = torch.device(kwargs["device"]) == DEVICE, torch.device("cpu")
        copies = func in (aten._to_copy.default, aten.copy_.default)
        if any(there) and not copies:
            # A number may come from the CPU, and so may what picks elements.
            must = zip(tensors[:1] if func in INDEXING else tensors, there, strict=False)
            if not all(at for tensor, at in must if tensor.ndim and tensor.numel()):
                raise RuntimeError(f"{func} of tensors on both devices.")
        comes_back = not there[0] if func is aten.copy_.default else copies and not target
        by_mask = func in INDEXING and any(at and t.dtype == torch.bool for t, at in zip(tensors, there, strict=True))
        by_counts = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        if any(there) and (comes_back or by_mask or by_counts or func in READING):
            self.waits.append(_our_line())

        args, kwargs = tree_map_only(SecondDeviceTensor, lambda tensor: tensor.held, (args, kwargs))
        result = func(*args, **kwargs)
        for tensor in tensors:
            if result is getattr(tensor, "held", tensor):
                return tensor  # changed in place
        return tree_map_only(Tensor, SecondDeviceTensor, result) if target else result


def move(module: nn.Module) -> nn.Module:
    """Moves parameters and buffers to the second device; to be called inside `SecondDevice()`."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(SecondDeviceTensor(parameter.detach()), requires_grad=False)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else SecondDeviceTensor(buffer)
    return module


def _our_line() -> str:
    for line in reversed(traceback.extract_stack()):
        if "_fastlongspeech.py" in line.filename:
            return f"{line.filename.rsplit('/', 1)[1]}, {line.name}: {line.line}"
    return "elsewhere"
