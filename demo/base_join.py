"""Base model, step 3: the language model learns to listen. The encoder is frozen; projector and language model train.

The projector already says words in the language model's own embeddings, with blanks between them, and from the start
whether a man or a woman speaks (:func:`tell_voices`). Written passages are trained on in between, so that the language
model still reads long ones although some words are misheard.
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


@torch.no_grad()
def tell_voices(
    model: Qwen2AudioForConditionalGeneration, packer: QuestionPacker, frames: list[torch.Tensor], is_man: list[bool]
) -> None:
    """Adds to ``model``'s projector whether a man or a woman speaks, in terms of the words "man" and "woman".

    A ridge regression on the recordings' mean frames finds the direction in which the voices differ. Along it, the
    projector adds the difference of the two words' embeddings. The added part is small: for a frame that lies one
    standard deviation off, a quarter of a word's embedding.
    """
    means = torch.stack([rows.float().mean(0) for rows in frames])
    center = means.mean(0)
    target = torch.tensor([1.0 if man else -1.0 for man in is_man])
    covariance = (means - center).T @ (means - center) / len(means) + 1e-4 * torch.eye(len(center))
    listen = torch.linalg.solve(covariance, (means - center).T @ (target - target.mean()) / len(means))
    listen /= 4 * (torch.cat(frames[::20]).float() @ listen).std()
    words = model.model.language_model.embed_tokens.weight
    man, woman = (words[packer.words(word)[0]] for word in ("man", "woman"))
    speak = nn.functional.normalize(man - woman, dim=0) * words.norm(dim=1).mean()
    linear = model.model.multi_modal_projector.linear
    linear.weight += torch.outer(speak, listen.to(speak.device))
    linear.bias -= speak * (center @ listen).item()


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
    tell_voices(model, packer, frames, [row["questions"][-1]["answer"] == "man" for row in recordings.rows])
    order = np.argsort([len(rows) for rows in frames])

    def loss_fn(step: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"join-{step}")
        if rng.random() < 0.4:
            return passage_loss(model, packer, rng, progress=1, as_heard=True)
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
