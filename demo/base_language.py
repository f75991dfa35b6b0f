"""Base model, step 1: the language model learns to find facts in written passages.

Passages grow from a single sentence, where an answer can only be copied, to texts in which it must be found.
A passage takes the place of the audio, as it will sound to the language model: first its bare tokens, then the same
tokens spread over up to 750 positions with noise in between, like frames of speech with their blanks. Passages are
as long as recordings of 4 minutes (real language models have read long texts too); no sound is involved.
"""

import random
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2AudioForConditionalGeneration

from .base_model import QuestionPacker, answer_loss, fit
from .sentences import REPEAT, TRANSCRIBE, PassageWriter


def train_language_model(
    model: Qwen2AudioForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    steps: int,
    learning_rate: float = 1.5e-3,
) -> None:
    """Trains ``model``'s language model and head in place."""
    packer = QuestionPacker(tokenizer)
    language_model = torch.nn.ModuleList([model.model.language_model, model.lm_head])
    embedding = model.model.language_model.embed_tokens

    def loss_fn(step: int) -> dict[str, torch.Tensor]:
        rng, progress = random.Random(f"language-{step}"), step / steps
        sentences, spread = rng.randint(1, 3), 1.0
        if progress > 0.5:
            sentences = rng.randint(10, 80) if rng.random() < 0.15 else rng.randint(2, 10)
            spread = rng.uniform(1, max(1.0, min(12, 80 / sentences)))
        positions = 8 * sentences * spread + 14 * min(8, sentences) + 30  # of one passage, about
        noise = embedding.weight.detach().std() * rng.uniform(0, 0.5) if progress > 0.5 else None

        lengths, embeds, questions = [], [], []
        for _ in range(max(2, round(3500 / positions))):
            tokens, pairs = draw(rng, sentences)
            length = round(len(tokens) * spread)
            places = torch.randperm(length)[: len(tokens)].sort().values.to(model.device)
            audio = embedding.weight.new_zeros(length, embedding.weight.shape[1])
            if noise is not None:
                audio = torch.randn(audio.shape).to(model.device) * noise
            embeds.append(audio.index_add(0, places, embedding(torch.tensor(tokens, device=model.device))))
            lengths.append(length)
            questions.append(pairs)
        loss, accuracy = answer_loss(model, packer.pack(lengths, questions), torch.cat(embeds))
        return {"loss": loss, "accuracy": accuracy}

    def draw(rng: random.Random, sentences: int) -> tuple[list[int], list[tuple[str, str]]]:
        """Draws a passage and its questions: its tokens, and pairs of question and answer."""
        kinds = 1 if sentences <= 3 else rng.randint(1, 3) if sentences <= 10 else rng.randint(3, 8)
        writer = PassageWriter(rng, False, 0.9 if sentences <= 3 else rng.uniform(0.5, 0.8), kinds)
        text = " ".join(writer.add_sentence() for _ in range(sentences))
        stated = [
            (said, fact) for said, fact in zip(writer.passage.sentences, writer.passage.facts, strict=True) if fact
        ]
        asked = rng.sample(stated, min(8, len(stated)))
        pairs = [(rng.choice(fact.questions()), fact.value) for _, fact in asked]
        pairs += [(REPEAT.format(s=fact.subject), said) for said, fact in asked[:1]]
        if sentences <= 3 or not pairs or (sentences <= 10 and rng.random() < 0.2):
            pairs.append((TRANSCRIBE, text))
        return packer.words(text), pairs

    fit("language", folder, language_model, loss_fn, steps, learning_rate)
