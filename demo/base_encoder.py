"""Base model, step 2: the audio encoder learns to hear words, through heads that are thrown away.

One head reads the words (the language model's tokens) off the final frames, by CTC; the other names the phone of every
frame of the middle layer, at 50 Hz, which the synthesizers tell. Phones are learnt first and carry the words. Excerpts
grow from sentences to recordings of 29 s, and are placed anywhere in the window of 30 s: short ones teach the encoder
all of its positions.
"""

import json
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from .base_model import QuestionPacker, fit
from .phones import label_frames

MEL_RATE = 100  # mel frames per second


@dataclass
class Recordings:
    """Descriptions of recordings, their mel frames, ``mels[i]`` (mel frames, 80) float16, and the phone of each mel
    frame, ``phones[i]`` (mel frames,) int16, by its place in ``phone_names``."""

    rows: list[dict]
    mels: list[np.ndarray]
    phones: list[np.ndarray]
    phone_names: list[str]


def _mel(feature_extractor: WhisperFeatureExtractor, path: Path) -> np.ndarray:
    torch.set_num_threads(1)
    samples, rate = soundfile.read(path, dtype="float32")
    features = feature_extractor(samples, sampling_rate=rate, padding="do_not_pad", return_tensors="np").input_features
    return np.asarray(features[0], dtype=np.float16).T


def load_recordings(folder: Path, feature_extractor: WhisperFeatureExtractor, cache: Path) -> Recordings:
    """Reads a split of the corpus and makes its mel frames and phones, once: they are kept in ``cache``."""
    rows = [json.loads(line) for line in (folder / "recordings.jsonl").read_text().splitlines()]
    if not cache.exists():
        with ProcessPoolExecutor(2) as pool:
            paths = [folder / row["audio"] for row in rows]
            work = pool.map(partial(_mel, feature_extractor), paths, chunksize=16)
            mels = list(tqdm(work, total=len(rows), desc="mel frames", mininterval=10))
        lengths = [len(mel) for mel in mels]
        names, phones = label_frames(rows, lengths, MEL_RATE)
        unfinished = cache.with_suffix(".tmp.npz")
        np.savez(unfinished, mels=np.concatenate(mels), phones=np.concatenate(phones), lengths=lengths, names=names)
        unfinished.replace(cache)
    stored = np.load(cache)
    ends = np.cumsum(stored["lengths"])[:-1]
    return Recordings(rows, np.split(stored["mels"], ends), np.split(stored["phones"], ends), stored["names"].tolist())


@dataclass
class Encoded:
    """What the encoder makes of a batch: ``frames`` (B, T, width) at 25 Hz after the final LayerNorm, with their
    ``lengths`` (B,), and the ``middle`` layer's output (B, T', width) at 50 Hz, with its ``middle_lengths`` (B,)."""

    frames: torch.Tensor
    lengths: torch.Tensor
    middle: torch.Tensor
    middle_lengths: torch.Tensor


def encode(model: Qwen2AudioForConditionalGeneration, mels: list[np.ndarray], place: float = 0.0) -> Encoded:
    """Runs the stock encoder's own layers on the longest excerpt of the batch instead of 30 s, padding masked.

    ``place`` says where in the window the excerpts are: 0 at its beginning, 1 so that the longest ends with it.
    """
    tower = model.model.audio_tower
    mel_lengths = torch.tensor([len(mel) for mel in mels])
    width = min(int(mel_lengths.max()) // 4 * 4 + 4, 2 * tower.max_source_positions)
    features = torch.zeros(len(mels), tower.num_mel_bins, width)
    for row, mel in zip(features, mels, strict=True):
        row[:, : len(mel)] = torch.from_numpy(mel.T.astype(np.float32))
    features, mel_lengths = features.to(tower.device), mel_lengths.to(tower.device)
    hidden = nn.functional.gelu(tower.conv1(features))
    hidden = nn.functional.gelu(tower.conv2(hidden)).transpose(1, 2)
    first = round(place * (tower.max_source_positions - hidden.shape[1]))
    hidden = hidden + tower.embed_positions.weight[first : first + hidden.shape[1]]
    middle_lengths, lengths = tower._get_feat_extract_output_lengths(mel_lengths)
    padding = torch.arange(hidden.shape[1], device=tower.device) >= middle_lengths[:, None]
    mask = torch.zeros_like(padding, dtype=torch.float32).masked_fill(padding, torch.finfo(torch.float32).min)
    mask = mask[:, None, None].expand(-1, -1, hidden.shape[1], -1)
    middle = hidden
    for number, layer in enumerate(tower.layers, start=1):
        hidden = layer(hidden, mask)
        if number == len(tower.layers) // 2:
            middle = hidden
    frames = tower.layer_norm(tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))
    return Encoded(frames, lengths, middle, middle_lengths)


class Excerpt(NamedTuple):
    """Whole sentences: their ``mels`` (mel frames, 80), the ``phones`` (mel frames,) in them, and their ``text``."""

    mels: np.ndarray
    phones: np.ndarray
    text: str


def draw_excerpts(recordings: Recordings, step: int, longest: float, batch_seconds: float) -> list[Excerpt]:
    """Draws excerpts of at most ``longest`` seconds each, as many as come to ``batch_seconds`` with their padding."""
    rng = random.Random(f"encoder-{step}")
    excerpts: list[Excerpt] = []
    seconds = 0.0
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
        if (len(excerpts) + 1) * seconds > batch_seconds and excerpts:
            return excerpts
        cut = slice(int(start * MEL_RATE), int(end * MEL_RATE))
        text = " ".join(sentence["text"] for sentence in sentences[first : last + 1])
        excerpts.append(Excerpt(recordings.mels[index][cut], recordings.phones[index][cut], text))


def _ctc_loss(logits: torch.Tensor, lengths: torch.Tensor, labels: list[torch.Tensor]) -> torch.Tensor:
    """Returns the CTC loss per label; ``logits`` (B, T, vocabulary + 1), blank last."""
    sizes = torch.tensor([len(label) for label in labels])
    loss = nn.functional.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        torch.cat(labels).to(logits.device),
        lengths,
        sizes.to(logits.device),
        blank=logits.shape[-1] - 1,
        reduction="sum",
        zero_infinity=True,
    )
    return loss / int(sizes.sum())


def look_around(audio_tower: Qwen2AudioEncoder) -> None:
    """Sets initial weights with which a position begins by attending to those around it.

    Queries and keys share their weights, so that likeness counts, and that of two sinusoidal positions falls with
    their distance (Trockman and Kolter, arXiv 2305.09828). Else words are heard where others of the window are spoken.
    """
    with torch.no_grad():
        layers: Any = audio_tower.layers
        for layer in layers:
            layer.self_attn.q_proj.weight.normal_(0, 0.08)
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def train_encoder(
    model: Qwen2AudioForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    recordings: Recordings,
    folder: Path,
    steps: int,
    learning_rate: float = 1e-3,
) -> nn.Linear:
    """Trains ``model``'s audio tower in place and returns the words' head, Linear(width, vocabulary + 1)."""
    look_around(model.model.audio_tower)
    packer = QuestionPacker(tokenizer)
    torch.manual_seed(1)
    width = model.model.audio_tower.layer_norm.weight.shape[0]
    words = nn.Linear(width, len(tokenizer) + 1).to(model.device)
    phones = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(recordings.phone_names))).to(model.device)
    modules = nn.ModuleList([model.model.audio_tower, words, phones])

    def loss_fn(step: int) -> dict[str, torch.Tensor]:
        progress = step / steps
        lengths = [(4, 40), (10, 60), (29, 80), (29, 80)] if progress > 0.2 else [(4, 40)]
        longest, batch_seconds = random.Random(f"longest-{step}").choice(lengths)
        excerpts = draw_excerpts(recordings, step, longest, batch_seconds)
        encoded = encode(model, [excerpt.mels for excerpt in excerpts], place=random.Random(f"place-{step}").random())
        spoken = [torch.tensor(packer.words(excerpt.text)) for excerpt in excerpts]
        loss_words = _ctc_loss(words(encoded.frames), encoded.lengths, spoken)
        heard = torch.cat([row[:length] for row, length in zip(encoded.middle, encoded.middle_lengths, strict=True)])
        uttered = torch.from_numpy(np.concatenate([excerpt.phones[::2] for excerpt in excerpts]))
        loss_phones = nn.functional.cross_entropy(phones(heard), uttered.to(heard.device, torch.int64))
        return {"loss": loss_words + 2 * loss_phones, "words": loss_words, "phones": loss_phones}

    fit("encoder", folder, modules, loss_fn, steps, learning_rate)
    return words
