"""Logits before and after a conversion, compared. One model is in memory at a time."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from .hosts import Host
from .weights import StoredWeights

SECONDS = 7.5
# How far two ways to compute the same logits may lie apart, as a part of the largest logit. A window that is padded to
# 30 s and one that is not are added up in another order.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
CTC = ("ctc_decoder.projector.weight", "ctc_decoder.projector.bias", "ctc_decoder.linear.weight")


def make_recording(rate: int, seconds: float = SECONDS) -> np.ndarray:
    """Returns a few seconds of tones that come and go, always the same: float32 samples at `rate` hertz."""
    time = np.arange(round(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * pitch * time) for pitch in (110, 330, 1250)) * np.sin(2 * np.pi * 1.7 * time)
    return (0.1 * tones + np.random.default_rng(0).normal(scale=0.01, size=len(time))).astype(np.float32)


def make_inputs(processor: Any, seconds: float = SECONDS) -> dict[str, Tensor]:
    """Returns the model's inputs for a question about `make_recording`, with a placeholder for every frame."""
    rate = processor.feature_extractor.sampling_rate
    part = {"type": "audio", "audio": {"array": make_recording(rate, seconds), "sampling_rate": rate}}
    turn = {"role": "user", "content": [part, {"type": "text", "text": "What is said?"}]}
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "compression": "none"}
    return dict(processor.apply_chat_template([turn], **options))


@torch.no_grad()
def stock_logits(
    host: Host, folder: Path, adapter: Path | None, inputs: dict[str, Tensor], dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Returns what the source's own weights answer without our code: `logits` `(S, vocabulary)` float32, and `ctc`
    `(T, pieces)` where it has a CTC decoder.

    Args:
        host, folder: the source.
        adapter: one in our names that PEFT puts beside it, or None.
        inputs: as `make_inputs` returns them.
        dtype, device: what to compute in and on.
    """
    model: Any = host.load_stock(folder, dtype)
    model = model.to(device)
    stored = StoredWeights(folder)
    ours = {host.rename(name).removeprefix("model."): name for name in stored.shapes}
    frames: list[Tensor] = []
    if CTC[2] in ours:
        tower = model.get_submodule(host.audio_tower)
        last_norm = getattr(tower, "layer_norm", None) or tower.ln_post
        last_norm.register_forward_hook(lambda module, arguments, output: frames.append(output))
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    found = {"logits": model(**host.model.stock_inputs(_to(inputs, device, dtype))).logits[0].float().cpu()}
    if CTC[2] in ours:
        hidden = frames[0].flatten(0, -2)[: int((inputs["input_ids"] == model.config.audio_token_id).sum())]
        hidden = hidden if CTC[0] in ours else model.get_submodule(host.projector)(hidden)
        weights = [stored.read(ours[name]).to(device, dtype) for name in CTC if name in ours]
        hidden = F.linear(hidden, *weights[:-1]) if len(weights) == 3 else hidden
        found["ctc"] = F.linear(hidden, weights[-1]).float().cpu()
    del model
    gc.collect()
    return found


@torch.no_grad()
def our_logits(
    host: Host, folder: Path, inputs: dict[str, Tensor], dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Returns the same of the converted folder, by our code."""
    model: Any = host.model.from_pretrained(folder, dtype=dtype).to(device).eval()
    inputs = _to(inputs, device, dtype)
    found = {"logits": model(**inputs).logits[0].float().cpu()}
    if model.config.ctc_trained:
        audio = {name: inputs[name] for name in ("input_features", "feature_attention_mask", "windows_per_audio")}
        hidden = model.model._ctc_input(model.encode(**audio).frames)
        found["ctc"] = model.model.ctc_decoder(hidden).float().cpu()
    return found


def compare(expected: dict[str, Tensor], found: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Returns the largest difference of each kind of logits as a part of the largest logit.

    Raises:
        ValueError: they differ by more than rounding does.
    """
    differences = {}
    for kind in expected:
        apart = float((expected[kind] - found[kind]).abs().max() / expected[kind].abs().max())
        if not apart <= BOUNDS[dtype]:
            raise ValueError(
                f"the converted model's {kind} differ from the source's by {apart:.2g} of the largest one, more than "
                f"{BOUNDS[dtype]:g}; the folder can't be trusted: delete it, and report what was converted."
            )
        differences[kind] = apart
    return differences


def _to(inputs: dict[str, Tensor], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: v.to(device, dtype) if v.is_floating_point() else v.to(device) for n, v in inputs.items()}


__all__ = ["compare", "make_inputs", "make_recording", "our_logits", "stock_logits"]
