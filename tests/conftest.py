"""What several test files share: tiny builders."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
from huggingface_hub import constants
from tokenizers import pre_tokenizers
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, Qwen2Tokenizer, WhisperFeatureExtractor

from fastlongspeech import FastLongSpeechConfig, FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
RATE = 16000
CLIP_SECONDS = [31.0, 1.0, 1.3, 1.7, 2.0, 2.6]
CLIP_TEXTS = ["the cat sat on a hill", "a dog ran", "the mat", "a cat ran over", "the dog sat on", "a hill"]


def speech(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Tones that drift and fade, with a little noise: float32 at `rate` hertz."""
    time = np.arange(round(seconds * rate)) / rate
    tones = np.sin(2 * np.pi * (200 + 20 * seed) * time) * (0.5 + 0.4 * np.sin(2 * np.pi * 0.3 * time))
    noise = np.random.default_rng(seed).normal(scale=0.01, size=time.shape)
    return (0.3 * tones + noise).astype(np.float32)


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keeps what tests remember of recordings' headers out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(tmp_path_factory.mktemp("home")))
        yield Path(constants.HF_HOME)


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    path = tmp_path / "speech.wav"
    soundfile.write(path, speech(1.5), RATE, subtype="FLOAT")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> Qwen2Tokenizer:
    """One token per byte and Qwen2-Audio's special tokens: 262 tokens, of which <|AUDIO|> is the last but one."""
    vocab = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|endoftext|>", "<|im_end|>")],
    )


@pytest.fixture(scope="session")
def ctc_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a SentencePiece model of some 20 pieces: the letters of "the cat sat on a hill" and a few more."""
    path = tmp_path_factory.mktemp("ctc") / "anything.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on a hill", "a dog ran over the mat"] * 10),
            model_writer=file,
            vocab_size=30,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


@pytest.fixture
def processor(tokenizer: Qwen2Tokenizer, ctc_model: Path) -> FastLongSpeechProcessor:
    """80 mel bins, the tiny tokenizer and SentencePiece model."""
    return FastLongSpeechProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer, ctc_model=str(ctc_model))


@pytest.fixture(scope="session")
def checkpoint(tokenizer: Qwen2Tokenizer, ctc_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete FastLongSpeech of 30 thousand random parameters, with the processor above."""
    processor = FastLongSpeechProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer, ctc_model=str(ctc_model))
    torch.manual_seed(0)
    model = FastLongSpeechForConditionalGeneration(
        FastLongSpeechConfig(
            audio_config={
                "num_mel_bins": 80,
                "d_model": 16,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
            },
            text_config={
                "model_type": "qwen2",
                "vocab_size": len(tokenizer),
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "pad_token_id": tokenizer.pad_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            },
            audio_token_index=processor.audio_token_id,
            ctc_vocab_size=processor.ctc_vocab_size,
        )
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


AUDIO_TOKEN = 90
MEL_BINS = 8


def tiny_config(**fields: Any) -> dict[str, Any]:
    """The fields of a two-layer model with a vocabulary of 100; large weights, so that no two logits tie."""
    return {
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": MEL_BINS,
            "d_model": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "initializer_range": 0.3,
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 100,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.3,
            "pad_token_id": 0,
        },
        "audio_token_index": AUDIO_TOKEN,
        **fields,
    }


@pytest.fixture
def make_model() -> Callable[..., FastLongSpeechForConditionalGeneration]:
    """Makes a tiny random model, always the same, with the configuration's fields given."""

    def make(**fields: Any) -> FastLongSpeechForConditionalGeneration:
        torch.manual_seed(0)
        config = FastLongSpeechConfig(**tiny_config(**({"ctc_vocab_size": 12} | fields)))
        model = FastLongSpeechForConditionalGeneration(config).eval()
        model.generation_config.eos_token_id = None
        return model

    return make


@pytest.fixture
def model(make_model: Callable[..., FastLongSpeechForConditionalGeneration]) -> FastLongSpeechForConditionalGeneration:
    return make_model()


@pytest.fixture
def stock() -> Qwen2AudioForConditionalGeneration:
    """Qwen2-Audio as transformers has it, of the same size as `model`."""
    torch.manual_seed(1)
    return Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(**tiny_config())).eval()


@pytest.fixture
def make_audio() -> Callable[..., dict[str, torch.Tensor]]:
    """Makes the windows of recordings, each given by the mel frames (10 ms) of its windows."""

    def make(*recordings: Sequence[int], seed: int = 0) -> dict[str, torch.Tensor]:
        mel_frames = torch.tensor([n for recording in recordings for n in recording])
        generator = torch.Generator().manual_seed(seed)
        # Slow changes and noise; different in every recording, and not zero in the padding.
        steps = torch.randn(len(mel_frames), MEL_BINS, 3000 // 20, generator=generator).repeat_interleave(20, dim=2)
        return {
            "input_features": steps + 0.3 * torch.randn(steps.shape, generator=generator),
            "feature_attention_mask": (torch.arange(3000) < mel_frames[:, None]).long(),
            "windows_per_audio": torch.tensor([len(recording) for recording in recordings]),
        }

    return make


@pytest.fixture
def make_prompts() -> Callable[..., dict[str, torch.Tensor]]:
    """Makes prompts, left padded: every number is a recording's placeholders, with text around it."""

    def make(*prompts: Sequence[int]) -> dict[str, torch.Tensor]:
        rows = []
        for number, recordings in enumerate(prompts):
            ids = [10 + number, 11]
            for placeholders in recordings:
                ids += [5] + [AUDIO_TOKEN] * placeholders + [6]
            rows.append(torch.tensor(ids + [20 + number, 7]))
        width = max(len(row) for row in rows)
        return {
            "input_ids": torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows]),
            "attention_mask": torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows]),
        }

    return make


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training stage's data: clips, and their manifests `asr.jsonl` and `qa.jsonl`; the first has two windows."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "clips").mkdir()
    noise = np.random.default_rng(0)
    for number, seconds in enumerate(CLIP_SECONDS):
        time = np.arange(round(seconds * RATE)) / RATE
        clip = 0.3 * np.sin(2 * np.pi * 150 * (number + 1) * time) + noise.normal(scale=0.05, size=time.shape)
        soundfile.write(folder / "clips" / f"{number}.wav", clip, RATE)
    spoken = [(f"clips/{number}.wav", text) for number, text in enumerate(CLIP_TEXTS)]
    write_rows(folder / "asr.jsonl", [{"audio": clip, "text": text, "more": 1} for clip, text in spoken])
    asked = [{"audio": clip, "question": "Who?", "answer": text.split()[1]} for clip, text in spoken]
    write_rows(folder / "qa.jsonl", asked)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of noises: 0.wav of 31 s, 1.wav and 2.wav of 1 and 2 s."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for number, seconds in enumerate((31, 1, 2)):
        soundfile.write(folder / f"{number}.wav", 0.1 * rng.standard_normal(seconds * RATE), RATE)
    return folder


def write_rows(path: Path, rows: list) -> Path:
    """Writes JSON lines; a row that is a string is written as it is."""
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path
