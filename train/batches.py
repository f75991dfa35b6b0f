"""Batches of both training stages: the order of rows, the target length of every step, and the collators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from ..data.audio import open_part
from ..data.manifests import recordings_of
from ..data.mixing import Mixture
from ..windows_fastlongspeech import WINDOWS
from .cache import FeatureCache


class StepSampler(Sampler):
    """Yields `(step, row number)` for every sample of an epoch: the collator learns the optimiser step from the data.

    The order depends on (seed, epoch) alone. Each run of `samples_per_step` samples (batch size x accumulation x
    processes) belongs to one optimiser step. Steps are counted from 0 over all epochs. The last step of an epoch is
    filled up with rows from the epoch's beginning, or left out (`drop_last`). So a step has the same rows however it
    is divided among micro-batches, processes and data loader workers, and after a resume.

    Args:
        durations: seconds of every row.
        samples_per_step: rows in one optimiser step, all processes together.
        seed: of the order.
        global_step: returns the number of optimiser steps taken so far; tells which epoch begins.
        strategy: `"random"`, `"sequential"`, or `"group_by_length"`: rows of like duration share a step.
        drop_last: leave out the last, incomplete step of an epoch.
        mixture: which rows an epoch has, of several sources; None: every row once.
    """

    MEGABATCH = 50  # steps sorted by duration together, as in transformers' LengthGroupedSampler

    def __init__(
        self,
        durations: Sequence[float],
        samples_per_step: int,
        seed: int,
        global_step: Callable[[], int],
        strategy: str = "random",
        drop_last: bool = False,
        mixture: Mixture | None = None,
    ):
        if strategy not in ("random", "sequential", "group_by_length"):
            raise ValueError(
                f"train_sampling_strategy must be random, sequential or group_by_length, got {strategy!r}; choose one."
            )
        if drop_last and len(durations) < samples_per_step:
            raise ValueError(
                f"dataloader_drop_last drops all {len(durations)} rows of a step of {samples_per_step}; switch it off."
            )
        self.durations, self.samples_per_step, self.seed = durations, samples_per_step, seed
        self.global_step, self.strategy, self.mixture = global_step, strategy, mixture
        steps = len(durations) / samples_per_step
        self.steps_per_epoch = math.floor(steps) if drop_last else math.ceil(steps)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.samples_per_step

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.global_step() // self.steps_per_epoch
        for step, rows in enumerate(self.steps_of(epoch), epoch * self.steps_per_epoch):
            for row in rows:
                yield step, row

    def steps_of(self, epoch: int) -> list[list[int]]:
        """Returns the row numbers of every step of an epoch."""
        rows = np.arange(len(self.durations)) if self.mixture is None else self.mixture.rows_of(self.seed, epoch)
        random = np.random.default_rng((self.seed, epoch))
        if self.strategy != "sequential":
            random.shuffle(rows)
        rows = np.resize(rows, len(self))  # filled up from the beginning
        if self.strategy == "group_by_length":
            durations = np.asarray(self.durations)
            size = self.MEGABATCH * self.samples_per_step
            chunks = (rows[start : start + size] for start in range(0, len(rows), size))
            rows = np.concatenate([chunk[np.argsort(durations[chunk], kind="stable")] for chunk in chunks])
        steps = rows.reshape(self.steps_per_epoch, self.samples_per_step)
        if self.strategy == "group_by_length":
            random.shuffle(steps)
        return steps.tolist()


class FrameBatches(Sampler):
    """Yields batches of `(step, row number)` pairs, each with at most so many frames; otherwise as `StepSampler`.

    Rows are shared out into batches once, rows of like duration together, so that an epoch always has as many steps.
    Which batches make up a step is drawn anew for every epoch.

    Args:
        durations: seconds of every row.
        frames_per_batch: most frames of a batch before fusion, 25 a second.
        batches_per_step: batches in one optimiser step, all processes together.
        seed, global_step, strategy, drop_last: as `StepSampler`.

    Raises:
        ValueError: a row alone has more frames.
    """

    batch_size = None  # for accelerate: there is no number of rows

    def __init__(
        self,
        durations: Sequence[float],
        frames_per_batch: int,
        batches_per_step: int,
        seed: int,
        global_step: Callable[[], int],
        strategy: str = "random",
        drop_last: bool = False,
    ):
        frames = np.ceil(np.asarray(durations) / WINDOWS.frame_seconds).astype(int)
        if frames.max() > frames_per_batch:
            raise ValueError(
                f"frames_per_batch is {frames_per_batch}, but the longest row has {frames.max()} frames; raise it."
            )
        order = np.random.default_rng(seed).permutation(len(frames))
        self.batches: list[list[int]] = []
        room = 0
        for row in order[np.argsort(frames[order], kind="stable")] if strategy != "sequential" else range(len(frames)):
            if frames[row] > room:
                self.batches.append([])
                room = frames_per_batch
            self.batches[-1].append(int(row))
            room -= frames[row]
        seconds = [sum(durations[row] for row in batch) for batch in self.batches]
        order_of_batches = "sequential" if strategy == "sequential" else "random"
        self.steps = StepSampler(seconds, batches_per_step, seed, global_step, order_of_batches, drop_last)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:  # type: ignore[override]  # batches, not rows
        for step, batch in self.steps:
            yield [(step, row) for row in self.batches[batch]]


def draw_target_length(seed: int, step: int, target_lengths: Sequence[int]) -> int:
    """Returns L of an optimiser step, uniform over `target_lengths`: L ~ U(L) of Eq. 7, a function of (seed, step)."""
    return target_lengths[int(np.random.default_rng((seed, step)).integers(len(target_lengths)))]


def listen(processor: Any, cache: FeatureCache | None, audio: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what the processor, and what then the model takes for recordings; see `FeatureCache.listen`."""
    return ({"audio": audio}, {}) if cache is None else cache.listen(processor, audio)


class CTCCollator:
    """Makes rows of `audio, text` into the inputs of the CTC loss; frames in `cache` stand for their features."""

    def __init__(self, processor: Any, cache: FeatureCache | None = None):
        self.processor, self.cache = processor, cache

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns `input_features`, `feature_attention_mask`, `windows_per_audio` and `ctc_labels`."""
        heard, of_model = listen(self.processor, self.cache, [open_part(row) for row in rows])
        return self.processor(**heard, ctc_text=[row["text"] for row in rows]) | of_model


class DCTCollator:
    """Makes rows of `audio, question, answer`, or `messages, answer`, into the inputs of dynamic compression training.

    All rows of an optimiser step get placeholders for one L, drawn from (seed, step). The step comes with the rows
    (see `StepSampler`). So L is the same in all processes, data loader workers and accumulated micro-batches, and
    after a resume. Rows that carry a `target_length` (evaluation) get that one. With the compression `"none"` every
    frame gets a placeholder, whatever L is. Frames in `cache` stand for their features.
    """

    def __init__(
        self,
        processor: Any,
        target_lengths: Sequence[int],
        seed: int,
        compression: str | None = None,
        cache: FeatureCache | None = None,
    ):
        self.processor, self.target_lengths, self.seed = processor, list(target_lengths), seed
        self.compression, self.cache = compression, cache

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns the processor's outputs with `labels`: prompt, audio and padding are -100."""
        target_length = rows[0].get("target_length")
        if target_length is None:
            target_length = self.draw_length(rows)
        recordings = [open_part(part) for row in rows for part in recordings_of(row)]
        heard, of_model = listen(self.processor, self.cache, recordings)
        batch = self.processor(
            **heard,
            text=[self.prompt(row) for row in rows],
            answers=[row["answer"] for row in rows],
            target_length=target_length,
            compression=self.compression,
        )
        return batch | of_model

    def draw_length(self, rows: list[dict[str, Any]]) -> int | list[int]:
        """Returns L of a training batch: one for all its recordings, or one for each."""
        return draw_target_length(self.seed, rows[0]["step"], self.target_lengths)

    def prompt(self, row: dict[str, Any]) -> str:
        """Returns a row's question about its recording, or its conversation, in the processor's chat template."""
        asked = [{"type": "audio"}, {"type": "text", "text": row.get("question")}]
        turns = row.get("messages") or [{"role": "user", "content": asked}]
        return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
