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
from .sentences import TRANSCRIBE, Fact, PassageWriter


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

    def draw(step: int) -> tuple[list[list[int]], list[list[tuple[str, str]]]]:
        """Draws passages of about one length, with up to 8 questions each."""
        rng = random.Random(f"language-{step}")
        progress = step / steps
        sentences = (
            rng.randint(1, 2) if progress < 0.1 else rng.randint(1, 5) if progress < 0.25 else rng.randint(3, 10)
        )
        if progress > 0.45 and rng.random() < 0.35:
            sentences = rng.randint(10, 80)
        passages, questions = [], []
        for _ in range(max(3, 240 // (sentences + 5))):
            kinds = rng.randint(1, 3) if sentences <= 10 else rng.randint(3, 8)
            writer = PassageWriter(rng, False, rng.uniform(0.5, 0.8), kinds)
            text = " ".join(writer.add_sentence() for _ in range(sentences))
            facts: list[Fact] = [fact for fact in writer.passage.facts if fact is not None]
            facts = rng.sample(facts, min(8, len(facts)))
            pairs = [(rng.choice(fact.questions()), fact.value) for fact in facts]
            if not pairs or (sentences <= 10 and rng.random() < 0.15):
                pairs.append((TRANSCRIBE, text))
            passages.append(packer.words(text))
            questions.append(pairs)
        return passages, questions

    def loss_fn(step: int) -> dict[str, torch.Tensor]:
        passages, questions = draw(step)
        rng = random.Random(f"spread-{step}")
        spread, noise = 1.0, 0.0
        if step / steps > 0.45:
            longest = max(map(len, passages))
            spread = rng.uniform(1, min(12, max(1.0, 750 / longest)))
            noise = rng.uniform(0, 0.5)
        lengths, embeds = [], []
        for tokens in passages:
            frames = max(len(tokens), round(len(tokens) * spread))
            places = torch.randperm(frames)[: len(tokens)].sort().values
            level = noise * embedding.weight.detach().std()
            audio = torch.randn(frames, embedding.weight.shape[1]).to(model.device) * level
            spoken = embedding(torch.tensor(tokens, device=model.device))
            audio = audio.index_add(0, places.to(model.device), spoken)
            embeds.append(audio)
            lengths.append(frames)
        loss, accuracy = answer_loss(model, packer.pack(lengths, questions), torch.cat(embeds))
        return {"loss": loss, "accuracy": accuracy, "spread": torch.tensor(spread)}

    fit("language", folder, language_model, loss_fn, steps, learning_rate)
