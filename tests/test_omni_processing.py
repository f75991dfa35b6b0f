"""Qwen2.5-Omni's processor: a recording of any duration is one row of mel features, cut into chunks of 2 s."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_omni  # noqa: F401  # skips this file where transformers has no host
import torch
from conftest import RATE, speech
from transformers import Qwen2Tokenizer, WhisperFeatureExtractor

from fastlongspeech import mel_fastlongspeech
from fastlongspeech.qwen2_5_omni_fastlongspeech import FastLongSpeechQwen2_5OmniProcessor

CHUNK = 200  # mel frames: 2 s
PROMPT = "<|audio_bos|><|AUDIO|><|audio_eos|>What is said?"


@pytest.fixture
def processor(tokenizer: Qwen2Tokenizer) -> Any:
    return FastLongSpeechQwen2_5OmniProcessor(WhisperFeatureExtractor(feature_size=80, chunk_length=300), tokenizer)


@pytest.mark.parametrize("seconds", [0.05, 1.98, 2.0, 47.315])
@pytest.mark.parametrize("shape", [lambda x: x, lambda x: x * np.linspace(0, 1, len(x)) ** 4], ids=["even", "rising"])
def test_features_are_those_of_the_whole_recording(
    processor: Any, seconds: float, shape: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers makes them, which pads to 300 s with zeros; also where the loudest sound is the last."""
    monkeypatch.setattr(mel_fastlongspeech, "BLOCK", 700)
    samples = shape(speech(seconds)).astype(np.float32)
    whole = processor.feature_extractor(samples, sampling_rate=RATE, return_attention_mask=True, return_tensors="np")
    held = int(whole["attention_mask"].sum())
    inputs = processor(audio=samples, sampling_rate=RATE)
    assert inputs["windows_per_audio"].tolist() == [-(-held // CHUNK)] == [len(inputs["input_features"])]
    chunks = inputs["input_features"].numpy()
    assert chunks.shape[1:] == (80, CHUNK) and inputs["feature_attention_mask"].sum() == held
    joined = np.concatenate(list(chunks), axis=1)
    np.testing.assert_allclose(joined[:, :held], whole["input_features"][0][:, :held], rtol=0, atol=1e-6)
    assert not joined[:, held:].any()


def test_nothing_is_cut_at_300_seconds(processor: Any) -> None:
    samples = speech(311.5)
    inputs = processor(text=PROMPT, audio=samples, sampling_rate=RATE, compression="none")
    assert inputs["feature_attention_mask"].sum() == 31_150
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == 7787
    assert float(inputs["input_features"][-1][:, :100].std()) > 0  # the last seconds are there


def test_several_recordings_and_a_length(processor: Any) -> None:
    two = processor(text=2 * PROMPT, audio=[speech(3.0), speech(1.0)], sampling_rate=RATE, target_length=[20, 99])
    assert two["windows_per_audio"].tolist() == [2, 1]
    ids = two["input_ids"][0]
    starts = (ids == processor.tokenizer.convert_tokens_to_ids("<|audio_bos|>")).nonzero().flatten()
    ends = (ids == processor.tokenizer.convert_tokens_to_ids("<|audio_eos|>")).nonzero().flatten()
    assert (ends - starts - 1).tolist() == [20, 25]
    alone = processor(audio=speech(1.0), sampling_rate=RATE)
    torch.testing.assert_close(two["input_features"][2:], alone["input_features"])


def test_a_chat_is_written_as_qwen2_5_omni_writes_it(processor: Any) -> None:
    turns = [
        {"role": "user", "content": [{"type": "audio", "audio": speech(1.0)}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A tone."},
    ]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|>What?<|im_end|>\n"
        "<|im_start|>assistant\nA tone.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
