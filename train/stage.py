"""What both training stages share beside their data: settings, the output folder, and the Trainer.

Settings come from a YAML recipe and the command line; the command line wins. Their names are those of the stage's own
arguments and of `transformers.TrainingArguments`. The output folder of a run holds `settings.yaml`, `checkpoint-N`
folders to resume from, and in the end the trained model and processor. Nothing that is there already is overwritten.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from safetensors.torch import save_file
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    HfArgumentParser,
    IntervalStrategy,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Trainer,
    TrainingArguments,
)

from ..data.streams import PREFIX
from .batches import FrameBatches, StepSampler
from .cache import MISSING, FeatureCache, FlushFeatures, describe_encoder
from .skipping import BAD_SAMPLES, ReportBadSamples, SteadyStream, steady

SETTINGS = "settings.yaml"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class StageArguments:
    """Arguments of both stages. Relative paths start at the current folder."""

    model: str = field(metadata={"help": "Folder or Hub id of the model to start from, ours or a host's own."})
    train_data: str = field(
        metadata={
            "help": "Manifest, tar files (speech-*.tar), datasets folder (folder#split), a YAML file of several with "
            "their weights, or a stream (stream:DATASET#split)."
        }
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "The same but a stream, held out; see eval_strategy."}
    )
    max_bad_share: float = field(
        default=0.01, metadata={"help": "Part of the samples that may be unreadable before the run is ended."}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Type of the frozen weights and of the saved model. What trains is float32 meanwhile."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa or flash_attention_2; what transformers chooses if not given."},
    )
    frames_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most frames of a batch before fusion, 25 a second, in the place of per_device_train_batch_size."
        },
    )
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder to keep the encoder's frames in; later epochs and runs skip the encoder."},
    )
    feature_cache_gb: float = field(
        default=100.0, metadata={"help": "Gigabytes that feature_cache may grow to; an hour of speech takes 0.23."}
    )


Stage = TypeVar("Stage", bound=StageArguments)


def parse_settings(stage: type[Stage], argv: Sequence[str] | None = None) -> tuple[Stage, TrainingArguments]:
    """Returns the stage's arguments and the Trainer's, from `[recipe.yaml] [--name value ...]`.

    Args:
        stage: the dataclass of the stage's own arguments.
        argv: the command line; `sys.argv[1:]` when None.

    Raises:
        ValueError: on an unknown name, or settings that contradict each other.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    known = [f.name for kind in (stage, TrainingArguments) for f in dataclasses.fields(kind) if f.init]
    if argv and argv[0].endswith((".yaml", ".yml")):
        recipe = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8")) or {}
        if not isinstance(recipe, dict):
            raise ValueError(f"{argv[0]} holds a {type(recipe).__name__}; write lines of `name: value`.")
        _refuse_unknown(recipe, known, argv[0])
        argv = _as_arguments(recipe) + argv[1:]
    parser = HfArgumentParser((stage, TrainingArguments), allow_abbrev=False)  # type: ignore[arg-type]
    settings, training, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    _refuse_unknown([word.lstrip("-").partition("=")[0] for word in unknown], known, "the command line")
    _check(settings, training)
    return settings, training


def _refuse_unknown(names: Any, known: list[str], where: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            remedy = f"did you mean {near[0]}?" if near else "see --help for the names."
            raise ValueError(f"{where} sets {name!r}, which is no setting; {remedy}")


def _as_arguments(recipe: dict[str, Any]) -> list[str]:
    words = []
    for name, value in recipe.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, bool | dict) else value}")
    return words


def _check(settings: StageArguments, training: TrainingArguments) -> None:
    if not training.output_dir:
        raise ValueError("output_dir is not set; name the folder for checkpoints and the trained model.")
    if settings.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {settings.dtype!r}; choose one.")
    if settings.dtype != "float32" and not (training.bf16 or training.fp16):
        raise ValueError(f"dtype {settings.dtype} needs mixed precision; set bf16 or fp16 to true.")
    if training.n_gpu > 1:  # nn.DataParallel would share out windows and prompts differently
        raise ValueError(f"one process sees {training.n_gpu} GPUs; use accelerate launch, or show it one GPU.")
    if settings.train_data.startswith(PREFIX) and training.max_steps < 1:
        raise ValueError(f"train_data {settings.train_data} is a stream, which has no end; set max_steps.")
    if (settings.eval_data or "").startswith(PREFIX):
        raise ValueError(f"eval_data {settings.eval_data} is a stream, which has no end; prepare a part of it.")
    if training.save_only_model:
        raise ValueError("save_only_model is true, which leaves nothing to resume from; set it to false.")
    if (settings.eval_data is None) != (training.eval_strategy == "no"):
        strategy = IntervalStrategy(training.eval_strategy).value
        raise ValueError(
            f"eval_data is {settings.eval_data!r} with eval_strategy {strategy!r}; set both to evaluate, or neither."
        )


def open_run(settings: StageArguments, training: TrainingArguments) -> str | None:
    """Returns the checkpoint to resume from, or None for a new run; prints and writes down the resolved settings.

    A checkpoint that is not complete, because the run was killed while it was written, is ignored.

    Raises:
        ValueError: when the output folder holds a finished model, or something that is not a run of this project.
    """
    output = Path(training.output_dir or "")
    resolved = _resolved(settings, training)
    if (output / "config.json").exists():
        raise ValueError(f"output_dir {output} already holds a finished model; choose another, or delete it.")
    checkpoint = training.resume_from_checkpoint or last_checkpoint(output)
    begun = (output / SETTINGS).exists()
    if not checkpoint and not begun and output.exists() and any(output.iterdir()):
        raise ValueError(f"output_dir {output} is not empty and holds no run to resume; choose another, or empty it.")
    training.distributed_state.wait_for_everyone()  # type: ignore[union-attr]
    if training.process_index == 0:
        print(yaml.safe_dump(resolved, sort_keys=False).rstrip(), flush=True)
        print(f"# resuming from {checkpoint}" if checkpoint else "# a new run", flush=True)
        if checkpoint and begun:
            before = yaml.safe_load((output / SETTINGS).read_text(encoding="utf-8"))
            for name in sorted({*before, *resolved}):
                if before.get(name) != resolved.get(name):
                    print(f"# {name} was {before.get(name)!r} when this run began", flush=True)
        else:
            output.mkdir(parents=True, exist_ok=True)
            (output / SETTINGS).write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
    return checkpoint


def _resolved(settings: StageArguments, training: TrainingArguments) -> dict[str, Any]:
    """Returns all of the stage's settings, and those of the Trainer that differ from its defaults."""
    defaults = TrainingArguments(use_cpu=training.use_cpu).to_dict()
    changed = {name: value for name, value in training.to_dict().items() if value != defaults[name]}
    return json.loads(json.dumps({**dataclasses.asdict(settings), **changed, "use_cpu": training.use_cpu}))


def last_checkpoint(output: Path) -> str | None:
    """Returns the last checkpoint in a folder that was written to its end, or None."""
    for folder in sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))  # what the Trainer writes last
        except (OSError, json.JSONDecodeError):
            continue
        return str(folder)
    return None


def open_cache(
    settings: StageArguments, training: TrainingArguments, model: Any, processor: ProcessorMixin
) -> FeatureCache | None:
    """Returns the feature cache that the settings name, or None; to be asked before the weights are sharded.

    Raises:
        ValueError: the encoder trains.
    """
    if settings.feature_cache is None:
        return None
    precision = "float16" if training.fp16 else "bfloat16" if training.bf16 else settings.dtype
    encoder = describe_encoder(model.model, processor, precision)
    width = model.config.frame_width
    return FeatureCache(settings.feature_cache, encoder, width, settings.feature_cache_gb * 1e9)


def trained_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Returns what has been trained by name, whole and on the CPU, from weights that may be shared out.

    All processes have to call it.
    """
    model: Any = trainer.model
    trains = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if trainer.is_deepspeed_enabled:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(trains.values())):
            return {name: weight.detach().cpu().clone() for name, weight in trains.items()}
    whole = {name: getattr(weight, "full_tensor", lambda weight=weight: weight)() for name, weight in trains.items()}
    return {name: weight.detach().cpu().clone() for name, weight in whole.items()}


def put_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Puts the weights of `trained_weights` into a model that was made in the same way."""
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise RuntimeError(f"the trained weights {', '.join(unknown)} have no place in the model that is saved.")


def export(model: PreTrainedModel, config: PreTrainedConfig, processor: ProcessorMixin, output: Path) -> None:
    """Writes a complete model folder into the output folder, `config.json` last: it marks a finished run.

    `config` is the model's from before training; the Trainer changes it (`use_cache`, special tokens).
    """
    unfinished = output / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.config = config
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    for file in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(file, output / file.name)
    unfinished.rmdir()


class StageTrainer(Trainer):
    """A Trainer whose rows carry their optimiser step (`StepSampler`), with dropout off in all that is frozen.

    `model` is a `HostForConditionalGeneration` or a PEFT model around it, with `requires_grad` as the stage wants it;
    `label` is the name of the model's input that holds the labels. `cache` is that of the collator; for
    `frames_per_batch` see the settings.
    """

    label = "labels"

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        cache: FeatureCache | None = None,
        max_bad_share: float = StageArguments.max_bad_share,
        frames_per_batch: int | None = None,
        **kwargs: Any,
    ):
        self.frames_per_batch = frames_per_batch
        journal = Path(str(args.output_dir)) / BAD_SAMPLES
        kwargs |= {name: steady(kwargs.get(name), journal, self._start) for name in ("train_dataset", "eval_dataset")}
        args.label_names = [self.label]
        args.remove_unused_columns = False  # the collators need the rows' own columns
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # all that trains is used in every step
        super().__init__(model=model, args=args, **kwargs)
        whole: PreTrainedModel = model if isinstance(model, PreTrainedModel) else model.get_base_model()
        parts = whole.base_model.children()
        self.frozen = [part for part in parts if not any(weight.requires_grad for weight in part.parameters())]
        self.extractor, self.cache = whole.base_model, cache
        if self.is_fsdp_enabled:
            self._shard_language_model_alone()
        if cache is not None:
            self.add_callback(FlushFeatures(cache))
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.add_callback(ReportBadSamples(journal, max_bad_share, step))

    def _start(self) -> dict[str, int]:
        """Returns where in a stream this process begins, as `StreamRows.arriving` takes it."""
        args = self.args
        return {
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "first_step": self.state.global_step,
            "batch_size": args.train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
            "process": args.process_index,
            "processes": args.world_size,
        }

    def get_train_dataloader(self) -> Any:
        if self.frames_per_batch is not None:
            return self._batches_by_frames(self.frames_per_batch)
        if not isinstance(self.train_dataset, SteadyStream):
            return super().get_train_dataloader()
        args = self.args
        args.ignore_data_skip = True  # the stream itself begins at the step that is resumed
        # Not prepared by accelerate, which would share out batches among processes: they read parts of their own.
        return DataLoader(
            self.train_dataset,
            batch_size=args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def _batches_by_frames(self, frames_per_batch: int) -> DataLoader:
        args = self.args
        if isinstance(self.train_dataset, SteadyStream) or self.train_dataset.mixture is not None:  # type: ignore
            raise ValueError("frames_per_batch needs one source whose durations are known; leave it out.")
        batches = FrameBatches(
            self.train_dataset.durations,  # type: ignore[union-attr]
            frames_per_batch,
            args.gradient_accumulation_steps * args.world_size,
            args.seed if args.data_seed is None else args.data_seed,
            lambda: self.state.global_step,
            str(args.train_sampling_strategy),
            args.dataloader_drop_last,
        )
        loader: DataLoader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        configuration = self.accelerator.dataloader_config
        even, configuration.even_batches = configuration.even_batches, False  # every step is whole already
        try:
            return self.accelerator.prepare(loader)
        finally:
            configuration.even_batches = even

    def _shard_language_model_alone(self) -> None:
        """Keeps what is frozen beside the language model whole in every process.

        Processes have other numbers of windows and of rounds of fusion. Parts that are shared out would have to run
        equally often in all.
        """
        text: Any = self.extractor.language_model
        plugin = self.accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in text.layers})
        plugin.ignored_modules = [part for part in self.frozen if part is not text]

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        args = self.args
        return StepSampler(
            self.train_dataset.durations,  # type: ignore[union-attr]
            self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            args.seed if args.data_seed is None else args.data_seed,
            lambda: self.state.global_step,
            str(args.train_sampling_strategy),
            args.dataloader_drop_last,
            self.train_dataset.mixture,  # type: ignore[union-attr]
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        return SequentialSampler(eval_dataset)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run killed between its last checkpoint and the export resumes within its last epoch, with no step left.
        # The Trainer looks for the end only after a step, so it would take one too many.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            for part in self.frozen:
                part.eval()
        return super().compute_loss(model, self.hear(inputs), *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes what trains alone; adapters have a form of their own."""
        if not isinstance(self.model, PreTrainedModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            os.makedirs(str(output_dir), exist_ok=True)
            trains = [name for name, weight in self.model.named_parameters() if weight.requires_grad]
            weights: dict[str, torch.Tensor] = self.model.state_dict() if state_dict is None else state_dict
            kept = {name: weights[name].contiguous() for name in trains}
            save_file(kept, os.path.join(str(output_dir), "model.safetensors"), metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warns of nothing: only frozen weights are missing in a checkpoint."""

    def hear(self, inputs: Any) -> Any:
        """Returns a batch with every frame that the cache lacks encoded, where there is a cache."""
        if self.cache is None or MISSING not in inputs:
            return inputs
        with self.accelerator.autocast():
            return self.cache.complete(self.extractor, inputs)
