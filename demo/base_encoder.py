"""Base model, step 2: the audio encoder learns to hear words, through a CTC loss on a head that is thrown away.

The head's vocabulary is the language model's. Excerpts grow from single sentences to whole recordings of 29 s.
"""

import json
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor

from .base_model import QuestionPacker, fit

MEL_RATE = 100  # mel frames per second


@dataclass
class Recordings:
    """Descriptions of recordings and their mel frames, ``mels[i]`` (mel frames, 80) float16."""

    rows: list[dict]
    mels: list[np.ndarray]


def _mel(feature_extractor: WhisperFeatureExtractor, path: Path) -> np.ndarray:
    torch.set_num_threads(1)
    samples, rate = soundfile.read(path, dtype="float32")
    features = feature_extractor(samples, sampling_rate=rate, padding=False, return_tensors="np").input_features
    return np.asarray(features[0], dtype=np.float16).T


def load_recordings(folder: Path, feature_extractor: WhisperFeatureExtractor, cache: Path) -> Recordings:
    """Reads a split of the corpus and computes its mel frames, once: they are kept in ``cache``."""
    rows = [json.loads(line) for line in (folder / "recordings.jsonl").read_text().splitlines()]
    if not cache.exists():
        with ProcessPoolExecutor(2) as pool:
            paths = [folder / row["audio"] for row in rows]
            work = pool.map(partial(_mel, feature_extractor), paths, chunksize=16)
            mels = list(tqdm(work, total=len(rows), desc="mel frames", mininterval=10))
        np.savez(cache.with_suffix(".tmp.npz"), frames=np.concatenate(mels), lengths=[len(mel) for mel in mels])
        cache.with_suffix(".tmp.npz").replace(cache)
    stored = np.load(cache)
    return Recordings(rows, np.split(stored["frames"], np.cumsum(stored["lengths"])[:-1]))


def encode(model: Qwen2AudioForConditionalGeneration, mels: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the encoder's frames (B, T, width) at 25 Hz after the final LayerNorm, and their lengths (B,).

    The stock encoder's own layers, run on the longest excerpt of the batch instead of 30 s, padding masked.
    """
    tower = model.model.audio_tower
    lengths = torch.tensor([len(mel) for mel in mels])
    features = torch.zeros(len(mels), tower.num_mel_bins, int(lengths.max()) // 4 * 4 + 4)
    for row, mel in zip(features, mels, strict=True):
        row[:, : len(mel)] = torch.from_numpy(mel.T.astype(np.float32))
    features, lengths = features.to(tower.device), lengths.to(tower.device)
    hidden = nn.functional.gelu(tower.conv1(features))
    hidden = nn.functional.gelu(tower.conv2(hidden)).transpose(1, 2)
    hidden = hidden + tower.embed_positions.weight[: hidden.shape[1]]
    states, frames = tower._get_feat_extract_output_lengths(lengths)
    padding = torch.arange(hidden.shape[1], device=tower.device) >= states[:, None]
    mask = torch.zeros_like(padding, dtype=torch.float32).masked_fill(padding, torch.finfo(torch.float32).min)[
        :, None, None
    ]
    mask = mask.expand(-1, -1, hidden.shape[1], -1)
    for layer in tower.layers:
        hidden = layer(hidden, mask)
    return tower.layer_norm(tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2)), frames


def draw_excerpts(
    recordings: Recordings, step: int, longest: float, batch_seconds: float
) -> tuple[list[np.ndarray], list[str]]:
    """Draws excerpts of whole sentences, at most ``longest`` seconds each: mel frames and their texts."""
    rng = random.Random(f"encoder-{step}")
    mels, texts, seconds = [], [], 0.0
    while True:
        index = rng.randrange(len(recordings.rows))
        sentences = recordings.rows[index]["sentences"]
        limit = rng.uniform(0.3, 1) * longest
        first = rng.randrange(len(sentences)) if longest < 29 else 0
        last = first
        while last + 1 < len(sentences) and sentences[last + 1]["end"] - sentences[first]["start"] < limit:
            last += 1
        start = max(0.0, sentences[first]["start"] - rng.uniform(0.02, 0.2))
        end = sentences[last]["end"] + rng.uniform(0.02, 0.2)
        seconds = max(seconds, end - start)
        if (len(mels) + 1) * seconds > batch_seconds and mels:
            return mels, texts
        mels.append(recordings.mels[index][int(start * MEL_RATE) : int(end * MEL_RATE)])
        texts.append(" ".join(sentence["text"] for sentence in sentences[first : last + 1]))


def train_encoder(
    model: Qwen2AudioForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    recordings: Recordings,
    folder: Path,
    steps: int,
    learning_rate: float = 1e-3,
) -> nn.Linear:
    """Trains ``model``'s audio tower in place and returns the CTC head, Linear(width, vocabulary + 1), blank last."""
    packer = QuestionPacker(tokenizer)
    torch.manual_seed(1)
    head = nn.Linear(model.config.audio_config.d_model, len(tokenizer) + 1).to(model.device)
    modules = nn.ModuleList([model.model.audio_tower, head])

    def loss_fn(step: int) -> dict[str, torch.Tensor]:
        progress = step / steps
        longest, batch_seconds = (4, 40) if progress < 0.55 else (10, 60) if progress < 0.75 else (29, 80)
        mels, texts = draw_excerpts(recordings, step, longest, batch_seconds)
        frames, lengths = encode(model, mels)
        labels = [torch.tensor(packer.words(text)) for text in texts]
        logits = head(frames).log_softmax(-1).transpose(0, 1)
        sizes = torch.tensor([len(label) for label in labels])
        loss = nn.functional.ctc_loss(
            logits,
            torch.cat(labels).to(model.device),
            lengths,
            sizes.to(model.device),
            blank=len(tokenizer),
            reduction="sum",
            zero_infinity=True,
        )
        return {"loss": loss / int(sizes.sum()), "longest": torch.tensor(float(longest))}

    fit("encoder", folder, modules, loss_fn, steps, learning_rate)
    return head
