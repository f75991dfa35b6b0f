"""Says what a training step takes before anything is loaded: memory of each GPU, and operations.

    fastlongspeech plan-training train/recipes/dct-qwen2-audio-7b.yaml --model Qwen/Qwen2-Audio-7B-Instruct --gpus 8

The settings are those of the stage, from a recipe and the command line. Weights, gradients and optimizer states are
counted from the sizes in config.json. The language model's part of a step, forward and backward, is run by torch on
tensors that have shapes and no contents; what would be alive at once, and the operations, are counted there. So
checkpointed activations, the kind of attention and the logits are in the numbers as the code has them. No weights are
read. `docs/training.md` compares the numbers with measured ones.
"""

from __future__ import annotations

import argparse
import copy
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import TrainingArguments

from ..app.cost import TEXT_TOKENS, ModelCost, mel_frames_of
from ..app.hosts import QWEN2_AUDIO, Host, host_of
from ..app.sizes import read_config
from ..windows_fastlongspeech import WINDOWS
from .ctc import CTCArguments
from .dct import DCTArguments, add_lora
from .stage import DTYPES, parse_settings

GB = 1e9
GPUS = (24, 40, 80)  # GB
RESERVE = 1.5  # GB of each GPU for CUDA itself, its libraries and what the allocator leaves unused
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # of a weight: 4 bits, a scale for 64 of them, a scale for 256 scales
FUSION_COPIES = 3  # of a recording's frames, in float32, that a round of fusion holds
SHARDINGS = ("none", "zero2", "zero3", "fsdp2")
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
SDPA: dict[Any, Any] = {  # torch itself counts the attention of other devices alone
    ATTENTION: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    ATTENTION_BACKWARD: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
}


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it; `peak` is the most that are alive at once.

    Args:
        model: its weights and buffers are there before, so that views of them are not counted.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._known: dict[int, weakref.ref] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            storage = tensor.untyped_storage()
            self._known[id(storage)] = weakref.ref(storage)
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, result)
        return result

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self._known or self._known[key]() is not storage:
            self.alive += size
            self.peak = max(self.peak, self.alive)
            self._known[key] = weakref.ref(storage, lambda _: self._free(size))
        return tensor

    def _free(self, size: int) -> None:
        self.alive -= size


class LikeCTC(torch.autograd.Function):
    """Holds what the CTC loss holds, which can't be run without numbers: its input, and as large a gradient."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(log_probs)
        return log_probs.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.empty_like(ctx.saved_tensors[0])


@dataclass(frozen=True)
class Plan:
    """What a step takes.

    Attributes:
        frozen, trained: bytes on each GPU of the weights that do not train, and of those that do with their gradients
            and optimizer states.
        fixed, per_row: bytes of a step on each GPU beside these: `fixed + rows * per_row`.
        rows: of one batch on one GPU.
        operations: of one optimizer step on one GPU.
    """

    frozen: float
    trained: float
    fixed: float
    per_row: float
    rows: int
    operations: float

    def total(self, rows: int | None = None) -> float:
        """Returns the bytes of a GPU with so many rows in a batch, `RESERVE` included."""
        return (
            self.frozen
            + self.trained
            + self.fixed
            + (self.rows if rows is None else rows) * self.per_row
            + RESERVE * GB
        )

    def most_rows(self, gigabytes: float) -> int:
        """Returns how many rows of a batch fit into so much memory."""
        return max(0, math.floor((gigabytes * GB - self.total(0)) / self.per_row))


def plan(
    settings: Any,
    training: TrainingArguments,
    gpus: int = 1,
    sharding: str = "none",
    seconds: float = 30.0,
    answer_tokens: int = 60,
) -> Plan:
    """Returns what a step of a stage takes.

    Args:
        settings, training: of either stage, see `parse_settings`.
        gpus: that share a step.
        sharding: what they share out: nothing, gradients and optimizer states (zero2), or weights as well.
        seconds: of every recording.
        answer_tokens: of every answer in stage 2.
    """
    raw = read_config(settings.model)
    host = host_of(raw) if "model_type" in raw else QWEN2_AUDIO
    config = host.config.from_dict({name: value for name, value in raw.items() if name != "model_type"})
    with torch.device("meta"):
        model = _model(host, config, settings)
    frozen, trained = _weights(model, settings, training, gpus, sharding)
    # A step's part grows evenly with rows and layers: steps of few are run, and say what one more of each takes.
    few, more = 1, 2
    steps = [
        [_step(host, _shallow(config, layers), settings, training, rows, seconds, answer_tokens) for rows in (1, 2)]
        for layers in (few, more)
    ]
    layers = 0 if isinstance(settings, CTCArguments) else config.get_text_config().num_hidden_layers
    deep = [
        few_layers + (more_layers - few_layers) * (layers - few) / (more - few) if layers else few_layers
        for few_layers, more_layers in zip(np.array(steps[0]), np.array(steps[1]), strict=True)
    ]
    (one_row, one_operations), (two_rows, two_operations) = deep
    sizes = ModelCost(config.to_dict())
    mel_frames = mel_frames_of(seconds)
    encoder = sizes.encoder(mel_frames)
    if not isinstance(settings, CTCArguments):
        length = max(settings.target_lengths or config.target_lengths)
        encoder += sum(sizes.fusion(int(WINDOWS.count_frames(mel_frames).sum()), length))
    rows = training.per_device_train_batch_size
    operations = (two_operations - one_operations + encoder) * rows * training.gradient_accumulation_steps
    fixed = 2 * one_row - two_rows + _dequantised(model, settings)
    return Plan(frozen, trained, fixed, two_rows - one_row, rows, operations)


def _shallow(config: Any, layers: int) -> Any:
    """Returns a configuration with so many layers of the language model."""
    shallow = copy.deepcopy(config)
    text = {name: value for name, value in config.get_text_config().to_dict().items() if name != "layer_types"}
    shallow.text_config = type(config.get_text_config())(**{**text, "num_hidden_layers": layers})
    return shallow


def _model(host: Host, config: Any, settings: Any) -> Any:
    """Returns the model as the stage has it, with what runs in a step in the type that it has there."""
    if isinstance(settings, CTCArguments):
        config.ctc_vocab_size = settings.vocab_size
        if settings.ctc_projector is not None:
            config.ctc_projector = settings.ctc_projector
        model = host.model(config).requires_grad_(False)
        model.model.ctc_decoder.requires_grad_(True)
        model.model.language_model.layers = torch.nn.ModuleList()
        return model
    whole = settings.tuning == "full"
    dtype = torch.float32 if whole else DTYPES[settings.dtype]
    attention = (settings.attn_implementation or "sdpa").replace("flash_attention_2", "sdpa")  # they hold the same
    model = host.model._from_config(config, dtype=dtype, attn_implementation=attention)
    if not whole:
        return add_lora(model, settings)
    model.requires_grad_(False)
    for part in (model.model.language_model, model.lm_head):
        part.requires_grad_(True)
    return model


def _leave_meta(model: torch.nn.Module) -> None:
    """Replaces tensors of the meta device by ones of the CPU, where mixed precision works; both have no contents."""
    made: dict[int, Any] = {}  # what is tied stays so
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) not in made:
                empty = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
                made[id(weight)] = torch.nn.Parameter(empty, weight.requires_grad)
            setattr(module, name, made[id(weight)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))


def _weights(model: Any, settings: Any, training: TrainingArguments, gpus: int, sharding: str) -> tuple[float, float]:
    """Returns the bytes of frozen weights, and of trained ones with gradients and optimizer states, on each GPU."""
    optim = str(getattr(training.optim, "value", training.optim))
    states = 0 if optim in ("sgd", "adafactor") else 2 if "8bit" in optim else 8  # bytes of each trained weight
    shared = 1 if sharding == "none" else gpus
    shared_weights = gpus if sharding in ("fsdp2", "zero3") else 1
    buckets = 4 if gpus > 1 and sharding == "none" else 0  # DDP's copy of the gradients
    of_trained = 4 / shared_weights + (4 + states) / shared + buckets
    qlora = getattr(settings, "tuning", "") == "qlora"
    frozen = trained = 0.0
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            trained += weight.numel() * of_trained
        elif "language_model." not in name and "lm_head." not in name:
            frozen += weight.numel() * DTYPES[settings.dtype].itemsize
        elif qlora and ".layers." in name and weight.ndim == 2:
            frozen += weight.numel() * NF4_BYTES
        else:
            frozen += weight.numel() * DTYPES[settings.dtype].itemsize / shared_weights
    return frozen, trained


def _dequantised(model: Any, settings: Any) -> float:
    """Returns the bytes of the greatest weight of a layer, which QLoRA unpacks for every product."""
    if getattr(settings, "tuning", "") != "qlora":
        return 0.0
    return 2.0 * max(weight.numel() for name, weight in model.named_parameters() if "language_model.layers" in name)


def _step(
    host: Host,
    config: Any,
    settings: Any,
    training: TrainingArguments,
    rows: int,
    seconds: float,
    answer_tokens: int,
) -> tuple[float, float]:
    """Returns the bytes that a batch takes beside weights and gradients, and its operations without the encoder's."""
    with torch.device("meta"):
        model = _model(host, config, settings)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _leave_meta(model)
        return _count_step(model, config, settings, training, rows, seconds, answer_tokens)


def _count_step(
    model: Any,
    config: Any,
    settings: Any,
    training: TrainingArguments,
    rows: int,
    seconds: float,
    answer_tokens: int,
) -> tuple[float, float]:
    stays = DTYPES[settings.dtype]
    width, windows = config.audio_config.d_model, rows * len(mel_frames_of(seconds))
    frames = rows * int(WINDOWS.count_frames(mel_frames_of(seconds)).sum())
    features = windows * config.audio_config.num_mel_bins * WINDOWS.mel_frames_per_window * 4
    for weight in model.parameters():  # gradients are counted with the weights
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    half = torch.float16 if training.fp16 else torch.bfloat16
    mixed = training.bf16 or training.fp16
    model.train()
    with (
        LiveMemory(model) as memory,
        FlopCounterMode(display=False, custom_mapping=SDPA) as flops,
        torch.autocast("cpu", half, enabled=mixed),
    ):
        if isinstance(settings, CTCArguments):
            heard = model.model._ctc_input(torch.empty(frames, width, dtype=stays))
            log_probs = model.model.ctc_decoder(heard).log_softmax(dim=-1, dtype=torch.float32)
            log_probs = torch.nn.utils.rnn.pad_sequence(list(log_probs.split(frames // rows)))
            loss = LikeCTC.apply(log_probs)
            del heard, log_probs
            loss.backward()
            fusion = 0
        else:
            if training.gradient_checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            length = min(max(settings.target_lengths or config.target_lengths), frames // rows)
            tokens = length + TEXT_TOKENS + answer_tokens
            embeddings = torch.empty(rows, tokens, config.get_text_config().hidden_size, dtype=stays)
            labels = torch.zeros(rows, tokens, dtype=torch.int64)
            model(inputs_embeds=embeddings, labels=labels, use_cache=False).loss.backward()
            fusion = 4 * FUSION_COPIES * frames * width
    held = features + frames * width * stays.itemsize
    return held + max(memory.peak, fusion, _encoder_bytes(config, windows, seconds, stays)), flops.get_total_flops()


def _encoder_bytes(config: Any, windows: int, seconds: float, dtype: torch.dtype) -> float:
    """Returns the bytes that the encoder holds at once, without gradients: one batch of windows in one layer."""
    audio = config.audio_config
    longest = int(WINDOWS.convolved(int(mel_frames_of(seconds).max())))
    positions = min(config.windows_per_batch, windows) * longest
    return positions * (3 * audio.d_model + 2 * audio.encoder_ffn_dim) * dtype.itemsize


def stage_of(recipe: str) -> Any:
    """Returns the arguments' class of the stage that a recipe is for, by the settings that only one stage has.

    Raises:
        ValueError: it has settings of neither.
    """
    names = set(yaml.safe_load(Path(recipe).read_text(encoding="utf-8")) or {})
    for stage, own in ((CTCArguments, ("vocab_size", "ctc_model")), (DCTArguments, ("lora_r", "tuning"))):
        if names & set(own):
            return stage
    raise ValueError(f"{recipe} could be for either stage; set vocab_size in it for stage 1, tuning for stage 2.")


def report(settings: Any, training: TrainingArguments, arguments: argparse.Namespace) -> str:
    """Returns the plan of a recipe as text, and for stage 2 what fits if other parts were trained."""
    options = (arguments.gpus, arguments.sharding, arguments.seconds, arguments.answer_tokens)
    found = plan(settings, training, *options)
    step = found.fixed + found.rows * found.per_row
    lines = [
        f"{found.rows} rows of {arguments.seconds:g} s on each GPU ({arguments.gpus}, sharding {arguments.sharding})",
        f"{found.operations / 1e12:.1f} Tera-operations per optimizer step on each GPU",
        "",
        f"{found.frozen / GB:6.1f} GB frozen weights",
        f"{found.trained / GB:6.1f} GB trained weights, gradients, optimizer states",
        f"{step / GB:6.1f} GB for the step",
        f"{RESERVE:6.1f} GB for CUDA and the allocator",
        f"{found.total() / GB:6.1f} GB together",
        "",
        "rows of a batch that fit:   " + "".join(f"{size:>5} GB" for size in GPUS),
    ]
    lines.append(_row("as the recipe says", found))
    if isinstance(settings, DCTArguments):
        for tuning in ("qlora", "lora", "full"):
            if tuning != settings.tuning:
                settings.tuning = tuning
                lines.append(_row(f"with --tuning {tuning}", plan(settings, training, *options)))
    return "\n".join(lines)


def _row(name: str, found: Plan) -> str:
    return f"{name:<28}" + "".join(f"{found.most_rows(size) or '-':>8}" for size in GPUS)


def main(argv: Sequence[str]) -> None:
    """Prints the plan of a recipe."""
    parser = argparse.ArgumentParser(
        prog="fastlongspeech plan-training",
        description="Says what a training step takes before anything is loaded. Other settings overrule the recipe's.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file of either stage")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="that share a step (default: 1)")
    parser.add_argument("--sharding", default="none", choices=SHARDINGS, help="what they share out (default: nothing)")
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S", help="of every recording (default: 30)")
    parser.add_argument("--answer-tokens", type=int, default=60, metavar="N", help="of every answer (default: 60)")
    arguments, more = parser.parse_known_args(argv)
    stage = stage_of(arguments.recipe)
    more = ["--train_data", "-", "--output_dir", "-", "--use_cpu", "true", *more]
    settings, training = parse_settings(stage, [arguments.recipe, *more])
    print(report(settings, training, arguments))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
