"""What the steps of the base model's training share: tokenizer, stock model, question packing, training loop."""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    get_cosine_schedule_with_warmup,
)

from .sentences import REPEAT, TRANSCRIBE, VOICE_QUESTIONS, PassageWriter

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<unk>",
]
VOCABULARY_SIZE = 1600
BEFORE_AUDIO = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nAudio 1: <|audio_bos|>"
AFTER_AUDIO = "<|audio_eos|>\n"
AFTER_QUESTION = "<|im_end|>\n<|im_start|>assistant\n"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a lower-casing subword (BPE) tokenizer trained on 20,000 training passages and their questions."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    rng = random.Random(0)
    texts = [TRANSCRIBE, REPEAT, *VOICE_QUESTIONS, "man woman", BEFORE_AUDIO, AFTER_QUESTION] * 1000
    texts += [chr(code) for code in range(33, 127)]
    for _ in range(20_000):
        writer = PassageWriter(rng, held_out=False, fact_share=0.7, num_kinds=2)
        texts += [writer.add_sentence() for _ in range(6)]
        texts += [rng.choice(fact.questions()) for fact in writer.passage.facts if fact]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=[chr(code) for code in range(33, 127)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        extra_special_tokens=["<|im_start|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"],
        padding_side="left",
    )


def position_frequencies(width: int) -> torch.Tensor:
    """Returns the angles (width / 2,) by which the encoder's sinusoidal positions turn from one to the next."""
    half = width // 2
    return torch.exp(-torch.arange(half) * (torch.log(torch.tensor(10_000.0)) / (half - 1)))


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2AudioForConditionalGeneration:
    """Returns a stock Qwen2-Audio model of 8 M parameters with random weights and sinusoidal encoder positions."""
    torch.manual_seed(seed)
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 80,
            "d_model": 256,
            "encoder_layers": 4,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 1024,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 8192,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        audio_token_index=int(tokenizer.vocab["<|AUDIO|>"]),
    )
    model = Qwen2AudioForConditionalGeneration(config)
    # Tied in training, so that it is easy to learn to copy a word from the passage. The stock class has no tie.
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    positions = model.model.audio_tower.embed_positions.weight
    angle = torch.arange(positions.shape[0])[:, None] * position_frequencies(positions.shape[1])
    positions.data.copy_(torch.cat([angle.sin(), angle.cos()], dim=1))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@dataclass
class PackedQuestions:
    """A batch of recordings, each with several questions that see the recording but not one another.

    ``input_ids``, ``position_ids``, ``labels`` (B, S) int64 (labels -100 where nothing is learnt, not yet shifted);
    ``attention_mask`` (B, 1, S, S) bool; ``is_audio`` (B, S) bool marks the audio placeholders.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    is_audio: torch.Tensor

    def to(self, device: torch.device) -> "PackedQuestions":
        """Returns the batch on a device."""
        return PackedQuestions(**{name: tensor.to(device) for name, tensor in vars(self).items()})


class QuestionPacker:
    """Lays out a recording and its questions in one sequence, each question in the layout of a single prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.audio_token = int(tokenizer.vocab["<|AUDIO|>"])
        self.pad_token = tokenizer.pad_token_id
        self.encode = lru_cache(200_000)(lambda text: tuple(tokenizer(text, add_special_tokens=False).input_ids))
        self.end = self.encode("<|im_end|>")

    def words(self, text: str) -> list[int]:
        """Returns the token ids of a transcript, word by word (cached)."""
        return [token for word in text.split() for token in self.encode(word)]

    def pack(self, audio_lengths: Sequence[int], questions: Sequence[Sequence[tuple[str, str]]]) -> PackedQuestions:
        """Returns the batch for recordings of ``audio_lengths`` positions and their (question, answer) pairs."""
        rows = []
        for length, pairs in zip(audio_lengths, questions, strict=True):
            ids = [*self.encode(BEFORE_AUDIO), *[self.audio_token] * length, *self.encode(AFTER_AUDIO)]
            shared = len(ids)
            positions, labels, owner = list(range(shared)), [-100] * shared, [0] * shared
            for number, (question, answer) in enumerate(pairs, start=1):
                prompt = self.encode(question) + self.encode(AFTER_QUESTION)
                reply = (*self.words(answer), *self.end)
                ids += [*prompt, *reply]
                positions += range(shared, shared + len(prompt) + len(reply))
                labels += [*[-100] * len(prompt), *reply]
                owner += [number] * (len(prompt) + len(reply))
            rows.append((ids, positions, labels, owner))
        size = max(len(row[0]) for row in rows)
        input_ids, position_ids, labels_, owner_ = (
            torch.tensor([row[part] + [fill] * (size - len(row[part])) for row in rows])
            for part, fill in enumerate((self.pad_token, 0, -100, -1))
        )
        visible = (owner_[:, None, :] == 0) | (owner_[:, None, :] == owner_[:, :, None])
        visible &= torch.ones(size, size, dtype=torch.bool).tril()
        is_audio = torch.eq(input_ids, self.audio_token)
        return PackedQuestions(input_ids, position_ids, labels_, visible[:, None], is_audio)


def answer_loss(
    model: Qwen2AudioForConditionalGeneration, batch: PackedQuestions, audio_embeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean cross-entropy of the answers' tokens and the share of them predicted right.

    ``audio_embeds`` (sum of audio lengths, hidden) float32 replace the placeholders in order.
    """
    language_model, batch = model.model.language_model, batch.to(model.device)
    embeds = language_model.embed_tokens(batch.input_ids)
    embeds = embeds.masked_scatter(batch.is_audio[..., None], audio_embeds)
    mask = torch.zeros_like(batch.attention_mask, dtype=torch.float32)
    mask = mask.masked_fill(~batch.attention_mask, torch.finfo(torch.float32).min)
    hidden = language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state
    learnt = batch.labels[:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][learnt])
    labels = batch.labels[:, 1:][learnt]
    return nn.functional.cross_entropy(logits, labels), (logits.argmax(-1) == labels).float().mean()


def fit(
    name: str,
    folder: Path,
    modules: nn.Module,
    loss_fn: Callable[[int], dict[str, torch.Tensor]],
    steps: int,
    learning_rate: float,
    warmup: int = 200,
    save_every: int = 100,
) -> None:
    """Trains ``modules`` with AdamW and a cosine schedule; resumes from, and logs to, ``folder``.

    ``loss_fn(step)`` returns named scalars, of which ``loss`` is minimised. Every step depends on its number
    alone, so a run that was killed goes on as if it had not been. Metrics land in ``folder/NAME.jsonl``.
    """
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(warmup, steps // 10), steps)
    checkpoint, log = folder / f"{name}.pt", folder / f"{name}.jsonl"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu")
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]
    modules.train()
    began = time.time()
    totals: dict[str, float] = {}
    for step in tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10):
        torch.manual_seed(step)
        metrics = loss_fn(step)
        metrics["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        for key, value in metrics.items():
            totals[key] = totals.get(key, 0.0) + value.item() / 25
        if (step + 1) % 25 == 0:
            with log.open("a") as lines:
                row = {"step": step + 1, **totals, "seconds": time.time() - began}
                lines.write(json.dumps({key: round(value, 4) for key, value in row.items()}) + "\n")
            totals = {}
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"schedule": schedule.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    modules.eval()
