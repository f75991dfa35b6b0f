"""Stage 1: trains the CTC decoder on transcripts. Its output tells how much text a frame carries (Eq. 2 and 3).

    python -m fastlongspeech.train.ctc train/recipes/ctc-qwen2-audio-7b.yaml --train_data asr.jsonl
    accelerate launch -m fastlongspeech.train.ctc my-recipe.yaml --learning_rate 1e-4

Rows are `audio, text`. The labels are pieces of a SentencePiece vocabulary. It is built from the transcripts as they
are written (case and punctuation included), or taken from an existing `ctc.model`. With `vocab_size: 0` the labels are
the language model's own tokens. The decoder starts fresh; all else is frozen, without dropout. The result is a
complete model folder with `ctc_trained` true.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import jiwer
import numpy as np
import sentencepiece
import torch
from transformers import set_seed

from ..app.hosts import Host, find_host
from ..data.check import label_faults
from ..data.manifests import SpeechRows, refuse
from ..data.mixing import MixedRows, load_training_rows
from ..data.streams import StreamRows
from ..host_fastlongspeech import HostForConditionalGeneration
from ..processor_fastlongspeech import SpeechProcessor
from .batches import CTCCollator
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


@dataclass
class CTCArguments(StageArguments):
    """Arguments of stage 1."""

    ctc_model: str | None = field(
        default=None,
        metadata={"help": "SentencePiece model of the labels; built from the transcripts if not given."},
    )
    vocab_size: int = field(
        default=10_000,
        metadata={
            "help": "Pieces of the vocabulary that is built; 0: the labels are the language model's own tokens."
        },
    )
    ctc_projector: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the decoder has a projector of its own to the width of the language model, or reads the "
            "multimodal projector's output; config.ctc_projector if not given."
        },
    )


def build_vocabulary(texts: Sequence[str], vocab_size: int) -> bytes:
    """Returns a SentencePiece model (BPE) of `vocab_size` pieces, the same for the same texts in the same order.

    Raises:
        ValueError: when `vocab_size` does not fit the texts; SentencePiece's reason says which size does.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=max(len(text.encode()) for text in texts) + 1,  # longer ones would be left out
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]
        raise ValueError(f"vocab_size {vocab_size} does not fit the transcripts: {reason}") from error
    return model.getvalue()


def check_lengths(rows: SpeechRows | MixedRows, source: str, processor: SpeechProcessor) -> None:
    """Refuses rows whose transcript is too long for CTC.

    Raises:
        ValueError: naming every such row.
    """
    encode: Callable[[str], list[int]] = partial(processor.tokenizer.encode, add_special_tokens=False)
    if processor.ctc_tokenizer is not None:
        encode = processor.ctc_tokenizer.encode
    faults = label_faults(rows.places, rows.durations, rows.texts("text"), encode, processor.windows)
    refuse(source, [f"{fault.place} {fault.text}" for fault in faults])


class CTCTrainer(StageTrainer):
    """Trains the CTC decoder; evaluation adds the word error rate."""

    label = "ctc_labels"

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Returns the loss, the greedy transcription's ids (recordings, S), and the labels, both padded with -100."""
        inputs = self.hear(self._prepare_inputs(inputs))
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        if prediction_loss_only:
            return loss, None, None
        labels = inputs.pop(self.label)
        with torch.no_grad(), self.accelerator.autocast():
            found = cast(HostForConditionalGeneration, self.model).ctc_transcribe(**inputs)
        rows = [torch.tensor(ids, dtype=labels.dtype, device=labels.device) for ids in found]
        return loss, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100), labels


def word_error_rate(processor: SpeechProcessor, prediction: Any) -> dict[str, float]:
    """Returns `wer` of an `EvalPrediction` whose predictions and labels are ids padded with -100."""

    def texts(ids: np.ndarray) -> list[str]:
        return processor.ctc_decode([row[row >= 0].tolist() for row in ids])

    return {"wer": jiwer.wer(texts(prediction.label_ids), texts(prediction.predictions))}


def load_model(host: Host, settings: CTCArguments, ctc_vocab_size: int) -> Any:
    """Returns the model to start from with a fresh CTC decoder; nothing in it trains."""
    dtype = DTYPES[settings.dtype]
    model = host.model.from_pretrained(
        settings.model, dtype=dtype, attn_implementation=settings.attn_implementation
    ).requires_grad_(False)
    if settings.ctc_projector is not None:
        model.config.ctc_projector = settings.ctc_projector
    model.model.reset_ctc_decoder(ctc_vocab_size)
    model.config.content_density, model.config.ctc_trained = "ctc", True
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """Runs stage 1."""
    settings, training = parse_settings(CTCArguments, argv)
    output = Path(str(training.output_dir))
    checkpoint = open_run(settings, training)
    columns = ("audio", "text")
    with training.main_process_first(local=False):  # it reads the headers, and the others what it remembers of them
        train_rows = load_training_rows(settings.train_data, columns)
        eval_rows = load_training_rows(settings.eval_data, columns) if settings.eval_data else None

    if isinstance(train_rows, StreamRows) and settings.vocab_size and not settings.ctc_model:
        raise ValueError("a stream's transcripts are not known in advance; name the vocabulary with ctc_model.")
    record_start(output, training, {"train_data": train_rows, "eval_data": eval_rows})

    ctc_model = output / "ctc.model"
    own_tokens = settings.vocab_size == 0 and not settings.ctc_model
    if training.process_index == 0 and not checkpoint:
        if own_tokens:
            ctc_model.unlink(missing_ok=True)  # of a run that was stopped before its first checkpoint
        else:
            given = Path(settings.ctc_model).read_bytes() if settings.ctc_model else None
            ctc_model.write_bytes(given or build_vocabulary(train_rows.texts("text"), settings.vocab_size))
    training.distributed_state.wait_for_everyone()  # type: ignore[union-attr]
    host = find_host(settings.model)
    if own_tokens:
        processor = host.processor.from_pretrained(settings.model)
        processor.ctc_tokenizer = None
    else:
        processor = host.processor.from_pretrained(settings.model, ctc_model=str(ctc_model))
    if not isinstance(train_rows, StreamRows):
        check_lengths(train_rows, settings.train_data, processor)
    if eval_rows:
        check_lengths(eval_rows, str(settings.eval_data), processor)

    set_seed(training.seed)
    model = load_model(host, settings, processor.ctc_vocab_size)
    model.model.ctc_decoder.to(torch.float32).requires_grad_(True)
    model.model.language_model.layers = torch.nn.ModuleList()  # the decoder reads frames, so they would lie idle
    cache = open_cache(settings, training, model, processor)

    trainer = CTCTrainer(
        model=model,
        args=training,
        max_bad_share=settings.max_bad_share,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=CTCCollator(processor, cache),
        cache=cache,
        frames_per_batch=settings.frames_per_batch,
        processing_class=processor,
        compute_metrics=lambda prediction: word_error_rate(processor, prediction),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()

    weights = trained_weights(trainer)
    if training.should_save:
        write_card(output, "The CTC decoder was trained on transcripts (stage 1).", trainer.state.log_history)
        model = load_model(host, settings, processor.ctc_vocab_size)
        put_weights(model, weights)
        export(model, model.config, processor, output)


if __name__ == "__main__":
    main()
