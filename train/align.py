"""Stage 0 of a model that was assembled: its projector, and LoRA on its language model, learn to read frames.

    python -m fastlongspeech.train.ctc my-ctc.yaml --model assembled --train_data asr.jsonl --output_dir runs/ctc
    python -m fastlongspeech.train.align train/recipes/align.yaml --model runs/ctc --train_data asr.jsonl

Rows are `audio, text`; the model is asked to transcribe or to repeat them, with every frame. Rows of `text_data`
(`question, answer`, and where there is one a `passage` that stands before the question) are mixed in, so that the
language model does not forget how to read.

Train the CTC decoder first. Then the projector begins by ridge regression, from the mean frame of what the decoder
takes for a token to the embedding of that token: the language model understands words from the first step on. In the
first epoch short clips come first. Checkpoints hold adapters and projector; in the end all is one complete folder.
"""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from .. import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from ..data.audio import open_part
from ..data.manifests import SpeechRows, refuse
from ..data.mixing import load_training_rows
from ..data.streams import StreamRows
from ..prompts_fastlongspeech import TRANSCRIBE
from .batches import StepSampler, listen
from .cache import MISSING, FeatureCache
from .record import record_start, write_card
from .stage import (
    DTYPES,
    StageArguments,
    StageTrainer,
    export,
    open_cache,
    open_run,
    parse_settings,
    put_weights,
    trained_weights,
)

INSTRUCTIONS = (
    TRANSCRIBE,
    "Transcribe the recording.",
    "Write down what is said.",
    "What does the speaker say?",
    "Repeat what was said.",
    "Repeat after the speaker.",
)
REGRESSION_BATCH = 8  # recordings that are encoded at a time
HELD_OUT = 20  # one recording in so many measures the regression
RIDGE = 1e-3  # of the mean variance
BLANK_WEIGHT = 0.05  # frames without text are many, and should become nothing


@dataclass
class AlignArguments(StageArguments):
    """Arguments of stage 0."""

    text_data: str | None = field(
        default=None, metadata={"help": "JSON lines of question and answer, with or without a passage before them."}
    )
    text_share: float = field(
        default=0.2, metadata={"help": "Rows of text_data that are added for every row of speech."}
    )
    lora_r: int = field(
        default=64,
        metadata={"help": "Rank of the adapters on all matrices of the language model; 0: all of it trains."},
    )
    lora_alpha: int = field(default=64, metadata={"help": "The adapters' output is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' input."})
    regression_rows: int = field(
        default=2000,
        metadata={"help": "Recordings that the projector begins from, by regression; 0: it begins as it is."},
    )


class ShortFirstSampler(StepSampler):
    """Steps of rows of like duration, those of the first epoch from short to long.

    Args:
        max_steps: of the whole run: where it ends within the first epoch, its steps are spread over all durations.
        others: as of `StepSampler`.
    """

    def __init__(self, *args: Any, max_steps: int, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "strategy": "group_by_length"})
        self.max_steps = max_steps

    def steps_of(self, epoch: int) -> list[list[int]]:
        steps = super().steps_of(epoch)
        if epoch == 0:
            taken = min(self.max_steps, len(steps))
            steps[:taken] = sorted(steps[:taken], key=lambda rows: max(self.durations[row] for row in rows))
        return steps


class AlignCollator:
    """Makes rows of `audio, text`, and rows of text among them, into prompts with `labels`.

    Which instruction and which rows of text are drawn depends on (seed, step, text of a row) alone: it is the same in
    every process, however a step is divided, and after a resume.
    """

    def __init__(
        self,
        processor: Any,
        texts: Sequence[dict[str, str]],
        text_share: float,
        seed: int,
        cache: FeatureCache | None = None,
    ):
        self.processor, self.texts, self.text_share = processor, texts, text_share
        self.seed, self.cache = seed, cache

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns the processor's outputs with `labels`: prompt, audio and padding are -100."""
        prompts, answers, read = [], [], []
        for row in rows:
            draw = np.random.default_rng((self.seed, row.get("step", 0), zlib.crc32(row["text"].encode())))
            instruction = INSTRUCTIONS[draw.integers(len(INSTRUCTIONS))] if "step" in row else TRANSCRIBE
            prompts.append(self.prompt([{"type": "audio"}, {"type": "text", "text": instruction}]))
            answers.append(row["text"])
            if "step" in row and self.texts:
                count = int(self.text_share + draw.random())
                read += [self.texts[int(draw.integers(len(self.texts)))] for _ in range(count)]
        for text in read:
            asked = "\n".join(text[name] for name in ("passage", "question") if text.get(name))
            prompts.append(self.prompt([{"type": "text", "text": asked}]))
            answers.append(text["answer"])
        heard, of_model = listen(self.processor, self.cache, [open_part(row) for row in rows])
        batch = self.processor(**heard, text=prompts, answers=answers, compression="none")
        return batch | of_model

    def prompt(self, content: list[dict[str, str]]) -> str:
        """Returns a turn of the user in the processor's chat template."""
        turn = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


class AlignTrainer(StageTrainer):
    """A `StageTrainer` that takes short clips first."""

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        args = self.args
        return ShortFirstSampler(
            self.train_dataset.durations,  # type: ignore[union-attr]
            self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            args.seed if args.data_seed is None else args.data_seed,
            lambda: self.state.global_step,
            drop_last=args.dataloader_drop_last,
            mixture=self.train_dataset.mixture,  # type: ignore[union-attr]
            max_steps=self.state.max_steps,
        )


def load_texts(source: str) -> list[dict[str, str]]:
    """Returns the rows of `text_data`; lines with `audio` are those of another task and left to it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row lacks question or answer, or there is none.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"There is no text_data at {source!r}; check the path.")
    rows, faults = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            faults.append(f"line {number} is not JSON ({error}); write one object per line")
            continue
        if row is None or "audio" in row:
            continue
        if not all(isinstance(row.get(name), str) and row[name].strip() for name in ("question", "answer")):
            faults.append(f"line {number} lacks a question or an answer; write both")
        rows.append(row)
    refuse(source, faults)
    if not rows:
        raise ValueError(f"text_data {source} has no rows without audio; write some, or leave text_data out.")
    return rows


def heard_tokens(
    pieces: Tensor, blank: int, processor: FastLongSpeechProcessor
) -> Iterator[tuple[int | None, list[int]]]:
    """Yields the language model's tokens in what the CTC decoder hears, with their frames; None for frames without.

    Args:
        pieces: `(N,)` int64, the likeliest piece of every frame of one recording.
        blank: the piece that stands for none.
        processor: knows both vocabularies.
    """
    runs, counts = pieces.unique_consecutive(return_counts=True)
    text, frames_of, at = "", [], 0
    for piece, count in zip(runs.tolist(), counts.tolist(), strict=True):
        frames = list(range(at, at + count))
        at += count
        if piece == blank:
            yield None, frames
        elif processor.ctc_tokenizer is None:
            yield piece, frames
        elif not processor.ctc_tokenizer.is_unknown(piece):
            written = processor.ctc_tokenizer.id_to_piece(piece).replace("\u2581", " ")
            text += written
            frames_of += [[] if letter == " " else frames for letter in written]
    if text:
        tokens = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            frames = sorted({frame for letter in frames_of[start:end] for frame in letter})
            if frames:
                yield token, frames


@torch.no_grad()
def regress_projector(
    model: FastLongSpeechForConditionalGeneration,
    processor: FastLongSpeechProcessor,
    rows: SpeechRows,
    most: int,
    cache: FeatureCache | None = None,
    progress: bool = True,
) -> float:
    """Sets the projector by ridge regression: from the mean frame of a heard token to the token's embedding.

    Args:
        model: with a trained CTC decoder.
        processor: its processor.
        rows: recordings with `audio`; at most `most` of them, spread evenly, are heard.
        cache: as of the collators.
        progress: whether a bar is shown.

    Returns:
        The share of tokens in recordings held out whose own embedding is the nearest to what the projector makes.

    Raises:
        ValueError: the CTC decoder hears nothing.
    """
    inner = model.model.eval()
    linear, embed = inner.multi_modal_projector.linear, model.get_input_embeddings()
    width, hidden = linear.in_features, linear.out_features
    device = linear.weight.device
    inputs = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
    outputs = torch.zeros(width + 1, hidden, dtype=torch.float64, device=device)
    test: list[tuple[Tensor, Tensor]] = []
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)).tolist()
    batches = [chosen[start : start + REGRESSION_BATCH] for start in range(0, len(chosen), REGRESSION_BATCH)]
    heard = 0
    for batch in tqdm(batches, desc="regression", disable=not progress, mininterval=10):
        of_processor, of_model = listen(processor, cache, [open_part(rows[index]) for index in batch])
        if cache is not None and MISSING in of_model:
            recordings = cache.complete(inner, {**of_model})["recordings"]
        else:
            features = processor(**of_processor)
            recordings = inner._encode(**{name: value.to(device) for name, value in features.items()})
        pieces = inner.ctc_pieces(recordings).split(recordings.lengths.tolist())
        frames = inner.normalise(recordings.frames).split(recordings.lengths.tolist())
        for own_pieces, own_frames in zip(pieces, frames, strict=True):
            found = list(heard_tokens(own_pieces, model.config.ctc_blank, processor))
            means = torch.stack([own_frames[numbers].float().mean(0) for _, numbers in found]).double()
            said = torch.tensor([token is not None for token, _ in found], device=device)
            tokens = torch.tensor([token or 0 for token, _ in found], device=device)
            target = torch.where(said[:, None], embed(tokens).double(), 0.0)
            heard += 1
            if heard % HELD_OUT == 0:
                test.append((means[said], tokens[said]))
                continue
            weight = torch.where(said, 1.0, BLANK_WEIGHT).double()[:, None]
            means = F.pad(means, (0, 1), value=1.0)
            inputs += means.T @ (means * weight)
            outputs += means.T @ (target * weight)
    if not outputs.any():
        raise ValueError("the CTC decoder hears nothing in train_data; train it longer, or set regression_rows to 0.")
    inputs.diagonal().add_(RIDGE * inputs.diagonal().mean())
    solved = torch.linalg.solve(inputs, outputs)
    linear.weight.copy_(solved[:-1].T)
    linear.bias.copy_(solved[-1])
    if not test:
        return float("nan")
    means, tokens = (torch.cat(parts) for parts in zip(*test, strict=True))
    known = tokens.unique()
    near = F.normalize(linear(means.to(linear.weight.dtype)).float(), dim=-1) @ F.normalize(embed(known).float()).T
    return float((known[near.argmax(-1)] == tokens).float().mean())


def add_lora(model: FastLongSpeechForConditionalGeneration, settings: AlignArguments) -> Any:
    """Returns the model with adapters on all matrices of its language model's layers; its projector trains as well."""
    layers = [name for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D)]
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=[name for name in layers if name.startswith("model.language_model.")],
        modules_to_save=["multi_modal_projector"],
    )
    return get_peft_model(model, lora)


def make_trainable(model: FastLongSpeechForConditionalGeneration, settings: AlignArguments) -> Any:
    """Returns the model, or adapters around it, with what is tuned in float32; all else is frozen."""
    model.requires_grad_(False)
    trained: Any = add_lora(model, settings) if settings.lora_r else model
    if not settings.lora_r:
        for part in (model.model.language_model, model.model.multi_modal_projector, model.lm_head):
            part.requires_grad_(True)
    for weight in trained.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return trained


def main(argv: Sequence[str] | None = None) -> None:
    """Runs stage 0."""
    settings, training = parse_settings(AlignArguments, argv)
    if not 0 <= settings.text_share <= 10:
        raise ValueError(f"text_share must lie between 0 and 10, got {settings.text_share}; correct it.")
    for name in ("lora_r", "regression_rows"):
        if getattr(settings, name) < 0:
            raise ValueError(f"{name} must be 0 or more, got {getattr(settings, name)}; correct it.")
    checkpoint = open_run(settings, training)
    with training.main_process_first(local=False):  # it reads the headers, and the others what it remembers of them
        train_rows = load_training_rows(settings.train_data, ("audio", "text"))
        eval_rows = load_training_rows(settings.eval_data, ("audio", "text")) if settings.eval_data else None
    if isinstance(train_rows, StreamRows):
        raise ValueError(f"train_data {settings.train_data} is a stream; stage 0 takes short clips first: prepare it.")
    texts = load_texts(settings.text_data) if settings.text_data else []
    output = Path(str(training.output_dir))
    record_start(output, training, {"train_data": train_rows, "eval_data": eval_rows})

    processor = FastLongSpeechProcessor.from_pretrained(settings.model)
    dtype = DTYPES[settings.dtype]
    model = FastLongSpeechForConditionalGeneration.from_pretrained(settings.model, dtype=dtype)
    model.requires_grad_(False)  # the cache asks for a frozen encoder
    config = copy.deepcopy(model.config)
    set_seed(training.seed)
    cache = open_cache(settings, training, model, processor)
    main_process = training.process_index == 0
    if settings.regression_rows and not checkpoint:
        if not config.ctc_trained:
            raise ValueError(
                f"{settings.model} has no trained CTC decoder, from which the projector begins; run train.ctc first, "
                "or set regression_rows to 0."
            )
        model.to(training.device)
        right = regress_projector(model, processor, train_rows, settings.regression_rows, cache, main_process)
        if main_process:
            print(f"# regression: the nearest embedding is the right one for {right:.0%} of tokens", flush=True)
    trained = make_trainable(model, settings)

    collate: Callable[..., Any] = AlignCollator(processor, texts, settings.text_share, training.seed, cache)
    trainer = AlignTrainer(
        model=trained,
        args=training,
        max_bad_share=settings.max_bad_share,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=collate,
        cache=cache,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()

    weights = trained_weights(trainer)
    if training.should_save:
        stage = "Its projector and its language model learned to read the encoder's frames (stage 0)."
        write_card(output, stage, trainer.state.log_history)
        model = FastLongSpeechForConditionalGeneration.from_pretrained(settings.model, dtype=dtype)
        trained = make_trainable(model, settings)
        put_weights(trained, weights)
        whole = trained.merge_and_unload() if settings.lora_r else model
        export(whole.to(dtype), config, processor, output)


if __name__ == "__main__":
    main()
