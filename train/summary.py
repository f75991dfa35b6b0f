"""Speech-XL: a language model learns to sum recordings up inside its cache, see `summary_fastlongspeech.py`.

    python -m fastlongspeech.train.summary train/recipes/summary-qwen2-audio-7b.yaml --train_data qa.jsonl
    python -m fastlongspeech.train.summary my-recipe.yaml --phase asr --train_data asr.jsonl

Three phases, each a run of its own that starts from the model of the one before:

1. `--phase asr`: rows `audio, text`; the model transcribes, with every frame.
2. `--phase questions`: rows `audio, question, answer`, captions among them; with every frame.
3. `--phase summary` (the default): the same rows, summed up. Every interval draws its ratio, at first from the first
   set of `curriculum`, after `curriculum_steps` steps from the second, and so on to the last.

Phases 1 and 2 train LoRA on the language model and the projector. Phase 3 trains LoRA and the summary projections. All
draws depend on (seed, step) alone. Checkpoints hold adapters and whole modules together; in the end they are merged
into a complete model folder. Evaluation reports the loss at fixed ratios, as `eval_ratio8_loss`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import Dataset
from transformers import set_seed

from ..app.hosts import Host, find_host
from ..data.manifests import SpeechRows
from ..data.mixing import load_training_rows
from ..prompts_fastlongspeech import TRANSCRIBE, placeholder_runs
from ..summary_fastlongspeech import SUMMARY_MODULES
from .batches import DCTCollator
from .cache import FeatureCache
from .dct import LoRAArguments, add_lora
from .record import record_start, write_card
from .stage import (
    DTYPES,
    StageTrainer,
    export,
    open_cache,
    open_run,
    parse_settings,
    put_weights,
    trained_weights,
)

PHASES = {"asr": ("audio", "text"), "questions": ("audio", "question", "answer")}
PHASES["summary"] = PHASES["questions"]


@dataclass
class SummaryArguments(LoRAArguments):
    """Arguments of the three phases."""

    phase: str = field(default="summary", metadata={"help": "asr, questions or summary."})
    interval: int = field(
        default=720, metadata={"help": "Frames that are summed up together; a multiple of every ratio."}
    )
    curriculum: list[str] = field(
        default_factory=lambda: ["2", "2,4", "2,4,8", "2,4,8,16"],
        metadata={"help": "Sets of ratios that intervals draw from, one after the other."},
    )
    curriculum_steps: int = field(default=1000, metadata={"help": "Optimiser steps with each set but the last."})
    target_lengths: list[int] | None = field(
        default=None,
        metadata={"help": "Frames that 30 s are fused to before they are summed up, one drawn for every step; all."},
    )
    eval_ratios: list[int] = field(default_factory=lambda: [2, 8], metadata={"help": "Ratios to evaluate at."})


class SummaryCollator(DCTCollator):
    """Makes rows of `audio, question, answer`, or `audio, text`, into the inputs of a phase.

    An optimiser step draws a length for 30 s and, for each interval of a recording, a ratio; interval i of all its
    rows has the same. Rows that carry a `compression_ratio` (evaluation) get that one.

    Args:
        processor: the processor.
        curriculum: sets of ratios; empty where nothing is summed up.
        curriculum_steps: optimiser steps with each set but the last.
        interval: frames of an interval.
        target_lengths: frames of 30 s to draw from.
        seed: of the drawing.
        cache: of the encoder's frames.
    """

    def __init__(
        self,
        processor: Any,
        curriculum: Sequence[Sequence[int]],
        curriculum_steps: int,
        interval: int,
        target_lengths: Sequence[int],
        seed: int,
        cache: FeatureCache | None = None,
    ):
        super().__init__(processor, target_lengths, seed, "summary" if curriculum else "none", cache)
        self.curriculum, self.curriculum_steps, self.interval = curriculum, curriculum_steps, interval

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns the processor's outputs with `labels`, and `compression_ratio` `(intervals,)` where summed up."""
        fixed = rows[0].get("compression_ratio")
        rows = [{"question": TRANSCRIBE, "answer": row.get("text")} | row for row in rows]
        inputs = super().__call__(rows)
        if self.curriculum:
            runs = placeholder_runs(inputs["input_ids"] == self.processor.audio_token_id)
            intervals = -(-int(runs.max()) // self.interval)
            ratios = [fixed] * intervals if fixed else self.draw(rows[0]["step"], intervals)
            inputs["compression_ratio"] = torch.tensor(ratios)
        return inputs

    def draw(self, step: int, intervals: int) -> list[int]:
        """Returns the ratio of every interval in an optimiser step, each uniform over the set of the curriculum."""
        choices = self.curriculum[min(step // self.curriculum_steps, len(self.curriculum) - 1)]
        drawn = (np.random.default_rng((self.seed, step, interval)) for interval in range(intervals))
        return [choices[int(random.integers(len(choices)))] for random in drawn]


class AtRatio(Dataset):
    """Rows that are all summed up with one ratio."""

    def __init__(self, rows: SpeechRows, ratio: int):
        self.rows, self.ratio = rows, ratio
        self.durations, self.places = rows.durations, rows.places

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index] | {"compression_ratio": self.ratio}


def read_curriculum(settings: SummaryArguments) -> list[list[int]]:
    """Returns the sets of ratios; none in a phase that sums nothing up.

    Raises:
        ValueError: a setting is out of range, or the interval is no multiple of a ratio.
    """
    if settings.phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {settings.phase!r}; choose one.")
    for name in ("interval", "curriculum_steps"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be a positive integer, got {getattr(settings, name)}; correct it.")
    if min(settings.target_lengths or [1]) < 1:
        raise ValueError(f"target_lengths must be positive integers, got {settings.target_lengths}; correct them.")
    try:
        curriculum = [[int(ratio) for ratio in str(choices).split(",")] for choices in settings.curriculum]
    except ValueError:
        raise ValueError(
            f"curriculum must be sets of integers such as 2 2,4 2,4,8, got {settings.curriculum}; correct it."
        ) from None
    for ratio in {ratio for choices in [*curriculum, settings.eval_ratios] for ratio in choices}:
        if ratio < 1:
            raise ValueError(f"a ratio must be a positive integer, got {ratio}; correct curriculum or eval_ratios.")
    for ratio in {ratio for choices in curriculum for ratio in choices}:
        if settings.interval % ratio:
            raise ValueError(
                f"interval must be a multiple of every ratio of the curriculum, got {settings.interval} with {ratio}; "
                f"take {-(-settings.interval // ratio) * ratio}, or leave the ratio out."
            )
    return curriculum if settings.phase == "summary" else []


def load_model(host: Host, settings: SummaryArguments, interval: int | None) -> Any:
    """Returns the model to start from; where an interval is given, with what sums up that many frames."""
    model = host.model.from_pretrained(settings.model, dtype=DTYPES[settings.dtype])
    if interval and model.config.summary_interval != interval:
        model.model.add_summary(interval)
    return model


def make_trainable(model: Any, settings: SummaryArguments, whole: Sequence[str]) -> PeftModel:
    """Returns adapters around the model, with the modules named in `whole`, in float32; all else is frozen."""
    adapted = add_lora(model, settings, whole)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return adapted


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one phase."""
    settings, training = parse_settings(SummaryArguments, argv)
    curriculum = read_curriculum(settings)
    checkpoint = open_run(settings, training)
    columns = PHASES[settings.phase]
    with training.main_process_first(local=False):  # it reads the headers, and the others what it remembers of them
        train_rows = load_training_rows(settings.train_data, columns)
        eval_rows = load_training_rows(settings.eval_data, columns) if settings.eval_data else None

    output = Path(str(training.output_dir))
    record_start(output, training, {"train_data": train_rows, "eval_data": eval_rows})
    host = find_host(settings.model)
    processor = host.processor.from_pretrained(settings.model)
    interval = settings.interval if curriculum else None
    whole = SUMMARY_MODULES if curriculum else ("multi_modal_projector",)
    model = load_model(host, settings, interval)
    compression = model.config.compression
    model.config.compression = "summary" if curriculum else "none"
    config = copy.deepcopy(model.config)
    if not curriculum:
        config.compression = compression
    set_seed(training.seed)
    adapted = make_trainable(model, settings, whole)
    cache = open_cache(settings, training, model, processor)
    lengths = settings.target_lengths or [config.target_length]
    evaluated: Any = eval_rows and eval_rows.at(lengths[0])
    if curriculum and eval_rows:
        evaluated = {f"ratio{ratio}": AtRatio(evaluated, ratio) for ratio in settings.eval_ratios}
    trainer = StageTrainer(
        model=adapted,
        args=training,
        max_bad_share=settings.max_bad_share,
        train_dataset=train_rows,
        eval_dataset=evaluated,
        data_collator=SummaryCollator(
            processor, curriculum, settings.curriculum_steps, settings.interval, lengths, training.seed, cache
        ),
        cache=cache,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()

    weights = trained_weights(trainer)
    if training.should_save:
        stage = f"It was trained to sum recordings up inside its cache, phase {settings.phase}."
        write_card(output, stage, trainer.state.log_history)
        adapted = make_trainable(load_model(host, settings, interval), settings, whole)
        put_weights(adapted, weights)
        merged = adapted.merge_and_unload()
        for name, module in merged.named_modules():
            if name.rpartition(".")[2] in whole:
                module.to(DTYPES[settings.dtype])
        export(merged, config, processor, output)


if __name__ == "__main__":
    main()
