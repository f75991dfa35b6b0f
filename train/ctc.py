"""Stage 1: train the CTC decoder, whose output tells how much text a frame carries (Eq. 2 and 3), on transcripts.

    python -m fastlongspeech.train.ctc train/recipes/ctc-qwen2-audio-7b.yaml --train_data asr.jsonl
    accelerate launch -m fastlongspeech.train.ctc my-recipe.yaml --learning_rate 1e-4

Rows are `audio, text`. The labels are pieces of a SentencePiece vocabulary, built from the transcripts as they are
written there (case and punctuation included), or taken from an existing `ctc.model`. The decoder starts fresh;
everything else is frozen, dropout off. The result is a complete model folder with `content_density = "ctc"`.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import set_seed

from ..modeling_fastlongspeech import FastLongSpeechForConditionalGeneration
from ..processing_fastlongspeech import FastLongSpeechProcessor
from .data import BAD_ROWS_SHOWN, CTCCollator, SpeechRows, load_rows
from .stage import DTYPES, StageArguments, StageTrainer, export, open_run, parse_settings


@dataclass
class CTCArguments(StageArguments):
    """Arguments of stage 1."""

    ctc_model: str | None = field(
        default=None, metadata={"help": "SentencePiece model of the labels; built from the transcripts when not given."}
    )
    vocab_size: int = field(default=10_000, metadata={"help": "Pieces of the vocabulary that is built."})


def build_vocabulary(texts: Sequence[str], vocab_size: int) -> bytes:
    """Return a SentencePiece model (BPE) of `vocab_size` pieces, the same for the same texts in the same order.

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
