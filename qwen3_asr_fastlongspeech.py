"""Qwen3-ASR as a host: chunks of 1 s, attention over 8 s, 13 frames a second, an MLP, and Qwen3."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoModel
from transformers.models.qwen3_asr.configuration_qwen3_asr import Qwen3ASRConfig
from transformers.models.qwen3_asr.modeling_qwen3_asr import (
    Qwen3ASREncoder,
    Qwen3ASRForConditionalGeneration,
    Qwen3ASRModel,
    Qwen3ASRMultiModalProjector,
    Qwen3ASRPreTrainedModel,
)

from .encoder_qwen3_fastlongspeech import QWEN3_WINDOWS, Qwen3Encoder, Qwen3Windows
from .host_fastlongspeech import HostForConditionalGeneration, HostModel
from .processor_fastlongspeech import SpeechProcessor
from .settings_fastlongspeech import FastLongSpeechSettings

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}"
    "{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Qwen3ASRWindows(Qwen3Windows):
    """The geometry of the family, with the feature extractor's own count of mel frames."""

    def mel_frames(self, samples: int) -> np.ndarray:
        """Returns the mel frames that hold audio in every window of a recording of so many samples, `(W,)` int64.

        None of a part of 10 ms, and no fewer than those of half a second.
        """
        first = np.array([start for start, _ in self.cut(samples)], dtype=np.int64) // self.hop
        return (max(samples, 8000) // self.hop - first).clip(0, self.mel_frames_per_window)


@strict
class FastLongSpeechQwen3ASRConfig(FastLongSpeechSettings, Qwen3ASRConfig):  # type: ignore[misc]  # may be absent
    """Configuration of FastLongSpeech on Qwen3-ASR; one of Qwen3-ASR is enough."""

    model_type = "fastlongspeech_qwen3_asr"
    vanilla_types = ("qwen3_asr",)
    model_class = "qwen3_asr_fastlongspeech.FastLongSpeechQwen3ASRForConditionalGeneration"
    windows = Qwen3ASRWindows(**vars(QWEN3_WINDOWS))

    tie_word_embeddings: bool | None = True  # type: ignore[assignment]


class FastLongSpeechQwen3ASREncoder(Qwen3Encoder, Qwen3ASREncoder):
    """Qwen3-ASR's encoder up to its last LayerNorm."""


class FastLongSpeechQwen3ASRModel(HostModel, Qwen3ASRModel):
    """Audio encoder, CTC decoder, projector and language model, without a language modelling head."""

    config: FastLongSpeechQwen3ASRConfig
    _no_split_modules = ["WhisperEncoderLayer", "FastLongSpeechCTCDecoder"]

    def __init__(self, config: FastLongSpeechQwen3ASRConfig) -> None:
        Qwen3ASRPreTrainedModel.__init__(self, config)
        self.audio_tower = FastLongSpeechQwen3ASREncoder._from_config(config.audio_config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.multi_modal_projector = Qwen3ASRMultiModalProjector(config)
        self.add_ctc_decoder()

    def encode_windows(self, input_features: Tensor, mel_frames: Tensor) -> Tensor:
        return self.audio_tower(input_features, mel_frames).last_hidden_state

    def normalise(self, frames: Tensor) -> Tensor:
        return self.audio_tower.ln_post(frames)

    def project(self, hidden_states: Tensor) -> Tensor:
        return self.multi_modal_projector(hidden_states)


class FastLongSpeechQwen3ASRForConditionalGeneration(HostForConditionalGeneration, Qwen3ASRForConditionalGeneration):
    """Answers questions about recordings of any duration, as far as Qwen3-ASR does."""

    config: FastLongSpeechQwen3ASRConfig

    def __init__(self, config: FastLongSpeechQwen3ASRConfig) -> None:
        Qwen3ASRPreTrainedModel.__init__(self, config)
        self.model = FastLongSpeechQwen3ASRModel(config)
        self.add_head()

    @classmethod
    def stock_inputs(cls, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns inputs as the stock class takes them: the windows of the recording in one row."""
        named = super().stock_inputs(inputs)
        for name in ("input_features", "input_features_mask"):
            named[name] = torch.cat(list(named[name]), dim=-1)[None]
        return named


class FastLongSpeechQwen3ASRProcessor(SpeechProcessor):
    """Turns prompts and recordings of any duration into the model's inputs; see `SpeechProcessor`."""

    config_class = FastLongSpeechQwen3ASRConfig
    template = CHAT_TEMPLATE
    whole_recordings = True
    tokens = {
        "audio_token": "<|audio_pad|>",
        "audio_bos_token": "<|audio_start|>",
        "audio_eos_token": "<|audio_end|>",
        "end_of_turn_token": "<|im_end|>",
    }


FastLongSpeechQwen3ASRConfig.register_for_auto_class()
FastLongSpeechQwen3ASRForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = [
    "FastLongSpeechQwen3ASRConfig",
    "FastLongSpeechQwen3ASRForConditionalGeneration",
    "FastLongSpeechQwen3ASRModel",
    "FastLongSpeechQwen3ASRProcessor",
]
