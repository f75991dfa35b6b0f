"""What several test files share: tiny builders."""

from pathlib import Path

import pytest
import sentencepiece
import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer, WhisperFeatureExtractor

from fastlongspeech import FastLongSpeechConfig, FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]


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
            audio_token_id=processor.audio_token_id,
            ctc_vocab_size=processor.ctc_vocab_size,
        )
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
