"""Base model, step 1: the language model learns to find facts in written passages.

Passages grow from a single sentence, where an answer can only be copied, to texts in which it must be found. At first
many are terse: "anna paris" for "the home of anna is in paris". A passage stands where the audio will be, in the form
in which the language model will hear it. At first that is its bare tokens. Later the same tokens are spread over up to
750 positions with noise in between, like frames of speech with their blanks. Passages are as long as recordings of 4
minutes, as real language models have read long texts too. There is no sound in this step.
"""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2AudioForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from .base_model import QuestionPacker, answer_loss, fit
from .sentences import REPEAT, TRANSCRIBE, PassageWriter


def ease_recall(language_model: Qwen2Model) -> None:
    """Sets initial weights that make it easy to learn which value belongs to which name, the hardest part here.

    The heads of the first layer begin by looking 1, 2, 3 and 5 tokens back: a constant query and key, turned by the
    rotary embedding. They hand on what they see by one common map. In the layers above, queries and keys share their
    weights, so that a token begins by looking at tokens like itself (Trockman and Kolter, arXiv 2305.09828).
    """
    layers: Any = language_model.layers
    first, *others = (layer.self_attn for layer in layers)
    size = first.head_dim
    turns = language_model.rotary_emb.inv_freq[:12]  # the fast ones, which tell near from far
    with torch.no_grad():
        for head, distance in enumerate((1, 2, 3, 5)):
            start = head * size
            first.k_proj.bias[start : start + 12] = 3
            first.q_proj.bias[start : start + 12] = 3 * torch.cos(distance * turns)
            first.q_proj.bias[start + size // 2 : start + size // 2 + 12] = -3 * torch.sin(distance * turns)
            first.v_proj.weight[start : start + size] = first.v_proj.weight[:size]
            first.o_proj.weight[:, start : start + size] = first.o_proj.weight[:, :size]
        for attention in others:
            attention.q_proj.weight.normal_(0, 0.05)
            attention.k_proj.weight.copy_(attention.q_proj.weight)


def train_language_model(
    model: Qwen2AudioForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    steps: int,
    learning_rate: float = 5e-4,
) -> None:
    """Trains ``model``'s language model and head in place."""
    ease_recall(model.model.language_model)
    packer = QuestionPacker(tokenizer)
    language_model = torch.nn.ModuleList([model.model.language_model, model.lm_head])

    def loss_fn(step: int) -> dict[str, torch.Tensor]:
        return passage_loss(model, packer, random.Random(f"language-{step}"), step / steps)

    fit("language", folder, language_model, loss_fn, steps, learning_rate)


def passage_loss(
    model: Qwen2AudioForConditionalGeneration,
    packer: QuestionPacker,
    rng: random.Random,
    progress: float,
    as_heard: bool = False,
) -> dict[str, torch.Tensor]:
    """Returns the loss and the accuracy on newly written passages, as hard as they are at ``progress`` (0 to 1).

    ``as_heard``: passages are as in speech. Most are long, some words are misheard (some as another word of the
    passage), and some share a position with their neighbour.
    """
    sentences, spread = rng.randint(1, 4) if progress < 0.19 else rng.randint(2, 6), 1.0
    if progress > 0.375:
        sentences = rng.randint(10, 80) if rng.random() < (0.6 if as_heard else 0.15) else rng.randint(2, 10)
        spread = rng.uniform(1, max(1.0, min(12, 80 / sentences)))
    positions = 8 * sentences * spread + 11 * min(8, 2 * sentences) + 30  # of one passage, about
    embedding = model.model.language_model.embed_tokens
    noise = embedding.weight.detach().std() * rng.uniform(0, 0.5) if progress > 0.375 else None

    lengths, embeds, questions = [], [], []
    for _ in range(max(2, round(2000 / positions))):
        terse = min(1, 2 * rng.random()) if progress < 0.26 else 0.0
        text, pairs = _write(rng, sentences, terse)
        tokens = packer.words(text)
        length = round(len(tokens) * spread)
        said = embedding(torch.tensor(tokens, device=model.device))
        if as_heard:
            misheard = torch.rand(len(tokens), 1) * (torch.rand(len(tokens), 1) < rng.uniform(0, 0.15))
            said = said.lerp(said[torch.randperm(len(tokens))], misheard.to(model.device))
        most = 2 if as_heard else 1  # words that may share a position, which then holds their mean
        places = torch.randperm(most * length)[: len(tokens)].sort().values // most
        said = said / places.bincount()[places, None].to(model.device)
        audio = embedding.weight.new_zeros(length, embedding.weight.shape[1])
        if noise is not None:
            audio = torch.randn(audio.shape).to(model.device) * noise
        embeds.append(audio.index_add(0, places.to(model.device), said))
        lengths.append(length)
        questions.append(pairs)
    loss, accuracy = answer_loss(model, packer.pack(lengths, questions), torch.cat(embeds))
    return {"loss": loss, "accuracy": accuracy}


def _write(rng: random.Random, sentences: int, terse: float) -> tuple[str, list[tuple[str, str]]]:
    """Returns a passage and pairs of question and answer; ``terse`` is the share left out of the words that are
    neither subject nor value."""
    kinds = rng.randint(1, 3) if sentences <= 10 else rng.randint(3, 8)
    if sentences <= 6 and rng.random() < 0.7:
        kinds = 1
    writer = PassageWriter(rng, False, 0.9 if sentences <= 6 else rng.uniform(0.5, 0.8), kinds)
    stated, texts = [], []
    for _ in range(sentences):
        said = writer.add_sentence()
        if fact := writer.passage.facts[-1]:
            kept = f"{fact.subject} {fact.value}".split()
            said = " ".join(word for word in said.split() if word in kept or rng.random() >= terse)
            stated.append((said, fact))
        texts.append(said)
    text = " ".join(texts)
    asked = rng.sample(stated, min(8, len(stated)))
    pairs = [(question, fact.value) for _, fact in asked for question in fact.questions()][:8]
    pairs += [(REPEAT.format(s=fact.subject), said) for said, fact in asked[:1]]
    if sentences == 1 or not pairs or (sentences <= 10 and rng.random() < 0.2):
        pairs.append((TRANSCRIBE, text))
    return text, pairs
