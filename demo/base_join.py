"""Base model, step 3: the language model learns to listen; encoder frozen, projector and language model trained.

The projector already says words in the language model's own embeddings, with blanks between them. Written passages go
on in between, so that long ones are not forgotten.
"""

import random
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2AudioForConditionalGeneration

from .base_encoder import Recordings, encode
from .base_language import passage_loss
from .base_model import QuestionPacker, answer_loss, fit
from .sentences import TRANSCRIBE


@torch.no_grad()
def encode_recordings(
    model: Qwen2AudioForConditionalGeneration, recordings: Recordings, cache: Path
) -> list[torch.Tensor]:
    """Returns every recording's frames (T, width) float16, computed once and kept in ``cache``."""
    if cache.exists():
        return torch.load(cache)
    frames = [torch.empty(0)] * len(recordings.mels)
    order = sorted(range(len(recordings.mels)), key=lambda index: len(recordings.mels[index]))
    for start in tqdm(range(0, len(order), 8), desc="frames", mininterval=10):
        chosen = order[start : start + 8]
        encoded = encode(model, [recordings.mels[index] for index in chosen])
        for index, row, length in zip(chosen, encoded.frames, encoded.lengths, strict=True):
            frames[index] = row[:length].half().cpu()
    torch.save(frames, cache.with_suffix(".tmp"))
    cache.with_suffix(".tmp").replace(cache)
    return frames


def train_joined(
    model: Qwen2AudioForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    recordings: Recordings,
    frames: list[torch.Tensor],
    folder: Path,
    steps: int,
    batch_size: int = 12,
) -> None:
    """Trains ``model``'s projector and language model in place on questions, transcription and the voice."""
    packer = QuestionPacker(tokenizer)
    projector, language_model = model.model.multi_modal_projector, model.model.language_model
    order = np.argsort([len(rows) for rows in frames])

    def loss_fn(step: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"join-{step}")
        if rng.random() < 0.25:
            return passage_loss(model, packer, rng, progress=1)
        start = rng.randrange(max(1, len(order) - batch_size + 1))
        chosen = order[start : start + batch_size]  # about equally long, so little padding
        questions = []
        for index in chosen:
            row = recordings.rows[index]
            pairs = [(asked["question"], asked["answer"]) for asked in row["questions"]]
            if len(pairs) < 3 or rng.random() < 0.2:
                pairs.append((TRANSCRIBE, row["text"]))
            questions.append(pairs)
        audio = [frames[index] for index in chosen]
        batch = packer.pack([len(rows) for rows in audio], questions)
        loss, accuracy = answer_loss(model, batch, projector(torch.cat(audio).to(model.device).float()))
        return {"loss": loss, "accuracy": accuracy}

    fit("join", folder, nn.ModuleList([projector, language_model, model.lm_head]), loss_fn, steps, 3e-4)
