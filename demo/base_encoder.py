"""Base model, step 2: the audio encoder learns to hear words, and the projector to say them to the language model.

Three heads help in training and are thrown away afterwards:

- one reads the words (as the language model's tokens) off the final frames, by CTC;
- one names the word that is being spoken at each final frame. It helps the first head to find words, but not the
  projector, so its loss fades out;
- one names the phone of every frame of the middle layer, at 50 Hz.

The synthesizers tell when they speak which phone. Phones are learnt first, and words are built on them. The projector
learns to turn each frame into the language model's embedding of the word that CTC hears in it; blank is zero. Excerpts
grow from sentences to recordings of 29 s. Each is placed anywhere in the window of 30 s, so that short ones teach the
encoder all of its positions.
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

from .base_model import QuestionPacker, fit, position_frequencies
from .phones import FrameLabels, label_frames

MEL_RATE = 100  # mel frames per second
# How far each head of each layer looks at first, and how sharply; positions of 20 ms.
LOOKS = (((-5, -2, 2, 5), 1.5), ((-9, -3, 3, 9), 2.5), ((-14, -5, 5, 14), 4.0), ((-24, -8, 8, 24), 7.0))
PEAK = 10.0  # logit of a perfect match
SHARPNESS = 40.0  # of telling words by their squared distances


@dataclass
class Recordings:
    """Descriptions of recordings, their mel frames, ``mels[i]`` (mel frames, 80) float16, and the phones and words of
    these frames."""

    rows: list[dict]
    mels: list[np.ndarray]
    phones: FrameLabels
    words: FrameLabels


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
        phones, words = label_frames(rows, lengths, MEL_RATE)
        unfinished = cache.with_suffix(".tmp.npz")
        np.savez(
            unfinished,
            mels=np.concatenate(mels),
            lengths=lengths,
            phones=np.concatenate(phones.labels),
            phone_names=phones.names,
            words=np.concatenate(words.labels),
            word_names=words.names,
        )
        unfinished.replace(cache)
    stored = np.load(cache)
    ends = np.cumsum(stored["lengths"])[:-1]
    phones, words = (
        FrameLabels(stored[f"{name}_names"].tolist(), np.split(stored[f"{name}s"], ends)) for name in ("phone", "word")
    )
    return Recordings(rows, np.split(stored["mels"], ends), phones, words)


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
    """Whole sentences: their ``mels`` (mel frames, 80), the ``phones`` and ``words`` (mel frames,) in them, and their
    ``text``."""

    mels: np.ndarray
    phones: np.ndarray
    words: np.ndarray
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
        phones, words = recordings.phones.labels[index][cut], recordings.words.labels[index][cut]
        excerpts.append(Excerpt(recordings.mels[index][cut], phones, words, text))


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
    """Sets initial weights with which every head begins by attending to positions at a distance of its own.

    So the encoder begins as a time-delay network, and learns what to hear there. With stock weights, it hears words
    where others of the window are spoken.

    A position t is a vector of sines and cosines. That of t + d is the same vector, rotated by angles that depend on d
    alone. The keys have the weights of the queries, rotated back by these angles; so a query matches the key that lies
    d later. The queries weigh frequencies so that the match fades with the error e as exp(-e^2 / 2 spread^2). Queries
    and keys that begin alike are an idea of Trockman and Kolter (arXiv 2305.09828).
    """
    layers: Any = audio_tower.layers
    width = audio_tower.embed_positions.weight.shape[1]
    frequencies = position_frequencies(width)
    with torch.no_grad():
        for layer, (distances, spread) in zip(layers, LOOKS, strict=True):
            attention = layer.self_attn
            power = (frequencies * torch.exp(-((frequencies * spread) ** 2) / 2)).repeat(2)
            power = power / power.sum() * 4 * PEAK * attention.head_dim**0.5
            for head, distance in enumerate(distances):
                rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
                queries = torch.randn(attention.head_dim, width) * (power / attention.head_dim).sqrt()
                sine, cosine = torch.sin(frequencies * distance).diag(), torch.cos(frequencies * distance).diag()
                back = torch.cat((torch.cat((cosine, -sine), dim=1), torch.cat((sine, cosine), dim=1)))
                attention.q_proj.weight[rows] = queries
                attention.k_proj.weight[rows] = queries @ back


def _saying_loss(said: torch.Tensor, heard: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Returns how far ``said`` (N, hidden) is from the ``codes`` (words, hidden) of what was ``heard`` (N, words,
    probabilities): thrice the squared distance, and the cross-entropy of telling the words by their distances."""
    nearness = SHARPNESS * (said @ codes.T - codes.square().sum(1) / 2)
    distance = (said - heard @ codes).square().sum() / codes.square().sum(1).mean()
    return 3 * distance + nn.functional.cross_entropy(nearness, heard, reduction="sum")


def train_encoder(
    model: Qwen2AudioForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    recordings: Recordings,
    folder: Path,
    steps: int,
    learning_rate: float = 1.5e-3,
) -> None:
    """Trains ``model``'s audio tower and projector in place; its language model is trained already."""
    tower, projector = model.model.audio_tower, model.model.multi_modal_projector
    look_around(tower)
    packer = QuestionPacker(tokenizer)
    torch.manual_seed(1)
    width, blank = tower.layer_norm.weight.shape[0], len(tokenizer)
    words, spoken = (nn.Linear(width, blank + 1).to(model.device) for _ in range(2))
    phones = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(recordings.phones.names))).to(model.device)
    nn.init.zeros_(projector.linear.weight)  # a random one is far off at first and would spoil the heads' start
    modules = nn.ModuleList([tower, projector, words, spoken, phones])
    # The words that can be heard, blank last, and the embedding of each for the language model: zero for blank.
    vocabulary = sorted({token for word in recordings.words.names for token in packer.words(word)} | {blank})
    codes = nn.functional.pad(model.model.language_model.embed_tokens.weight.detach(), (0, 0, 0, 1))[vocabulary]
    last_token = np.array([blank, *(packer.words(word)[-1] for word in recordings.words.names[1:])])

    def loss_fn(step: int) -> dict[str, torch.Tensor]:
        progress = step / steps
        lengths = [(4, 40), (10, 60), (29, 80), (29, 80)] if progress > 0.2 else [(4, 40)]
        longest, batch_seconds = random.Random(f"longest-{step}").choice(lengths)
        excerpts = draw_excerpts(recordings, step, longest, batch_seconds)
        encoded = encode(model, [excerpt.mels for excerpt in excerpts], place=random.Random(f"place-{step}").random())
        tokens = [torch.tensor(packer.words(excerpt.text)) for excerpt in excerpts]
        logits = words(encoded.frames)
        loss_words = _ctc_loss(logits, encoded.lengths, tokens)

        frames, heard, logits = (
            torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)])
            for rows, counts in (
                (encoded.frames, encoded.lengths),
                (encoded.middle, encoded.middle_lengths),
                (logits, encoded.lengths),
            )
        )
        phone = np.concatenate([excerpt.phones[::2] for excerpt in excerpts])
        loss_phones = nn.functional.cross_entropy(phones(heard), torch.from_numpy(phone).to(heard.device, torch.int64))
        word = np.concatenate([last_token[excerpt.words[2::4]] for excerpt in excerpts])
        loss_spoken = nn.functional.cross_entropy(spoken(frames), torch.from_numpy(word).to(frames.device))
        heard_words = logits.detach()[:, vocabulary].softmax(-1)
        loss_said = _saying_loss(projector(frames), heard_words, codes) / sum(map(len, tokens))
        return {
            "loss": loss_words + 2 * loss_phones + max(0.0, 1 - 1.5 * progress) * loss_spoken + progress * loss_said,
            "words": loss_words,
            "phones": loss_phones,
            "spoken": loss_spoken,
            "said": loss_said,
        }

    fit("encoder", folder, modules, loss_fn, steps, learning_rate, warmup=60)
