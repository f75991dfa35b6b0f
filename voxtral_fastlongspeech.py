"""Voxtral as a host: Whisper's encoder in 30 s windows, an MLP on four frames side by side (12.5 Hz), and Llama.

The MLP reads four frames of 50 Hz as one of four times the width, so these are what is fused. The encoder was trained
without a mask, and hears the silence that fills a window; frames of nothing else are cut before the fusion.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoModel
from transformers.models.voxtral.configuration_voxtral import VoxtralConfig
from transformers.models.voxtral.modeling_voxtral import (
    VoxtralForConditionalGeneration,
    VoxtralModel,
    VoxtralMultiModalProjector,
    VoxtralPreTrainedModel,
)

from .host_fastlongspeech import HostForConditionalGeneration, HostModel
from .processor_fastlongspeech import SpeechProcessor
from .settings_fastlongspeech import FastLongSpeechSettings
from .windows_fastlongspeech import Windows

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}{{ eos_token }}"
    "{% else %}"
    "{% set mark = 'SYSTEM_PROMPT' if message['role'] == 'system' else 'INST' %}"
    "[{{ mark }}]"
    "{% if message['content'] is string %}"
    "{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}[BEGIN_AUDIO][AUDIO]{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "[/{{ mark }}]"
    "{% endif %}"
    "{% endfor %}"
)


class VoxtralWindows(Windows):
    """Voxtral's geometry: a frame stands for 80 ms, and a last one for what is left."""

    def count_frames(self, mel_frames: Any) -> Any:
        return -(-self.convolved(mel_frames) // 4)


@strict
class FastLongSpeechVoxtralConfig(FastLongSpeechSettings, VoxtralConfig):
    """Configuration of FastLongSpeech on Voxtral; one of Voxtral is enough."""

    model_type = "fastlongspeech_voxtral"
    vanilla_types = ("voxtral",)
    model_class = "voxtral_fastlongspeech.FastLongSpeechVoxtralForConditionalGeneration"
    windows = VoxtralWindows(mel_frames_per_frame=8)

    tie_word_embeddings: bool | None = False  # as Voxtral's head

    @property
    def frame_width(self: Any) -> int:
        """Width of what the MLP reads: four frames of the encoder."""
        return self.audio_config.intermediate_size


class FastLongSpeechVoxtralModel(HostModel, VoxtralModel):
    """Audio encoder, CTC decoder, projector and language model, without a language modelling head."""

    config: FastLongSpeechVoxtralConfig
    _no_split_modules: Any = ["VoxtralEncoderLayer", "FastLongSpeechCTCDecoder"]

    def __init__(self, config: FastLongSpeechVoxtralConfig) -> None:
        VoxtralPreTrainedModel.__init__(self, config)
        self.audio_tower = AutoModel.from_config(config.audio_config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.multi_modal_projector = VoxtralMultiModalProjector(config)
        self.add_ctc_decoder()

    def encode_windows(self, input_features: Tensor, mel_frames: Tensor) -> Tensor:
        frames = self.audio_tower(input_features).last_hidden_state
        return frames.reshape(len(frames), -1, self.config.frame_width)

    def normalise(self, frames: Tensor) -> Tensor:
        return frames  # normalised before four are put side by side

    def project(self, hidden_states: Tensor) -> Tensor:
        return self.multi_modal_projector(hidden_states)


class FastLongSpeechVoxtralForConditionalGeneration(HostForConditionalGeneration, VoxtralForConditionalGeneration):
    """Answers questions about recordings of any duration."""

    config: FastLongSpeechVoxtralConfig
    stock_mask = None

    def __init__(self, config: FastLongSpeechVoxtralConfig) -> None:
        VoxtralPreTrainedModel.__init__(self, config)
        self.model = FastLongSpeechVoxtralModel(config)
        self.add_head()


class FastLongSpeechVoxtralProcessor(SpeechProcessor):
    """Turns prompts and recordings of any duration into the model's inputs; see `SpeechProcessor`.

    The tokenizer is one of transformers; that of mistral-common takes no placeholders in text.
    """

    config_class = FastLongSpeechVoxtralConfig
    template = CHAT_TEMPLATE
    tokens = {"audio_token": "[AUDIO]", "audio_bos_token": "[BEGIN_AUDIO]", "end_of_turn_token": "</s>"}


FastLongSpeechVoxtralConfig.register_for_auto_class()
FastLongSpeechVoxtralForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = [
    "FastLongSpeechVoxtralConfig",
    "FastLongSpeechVoxtralForConditionalGeneration",
    "FastLongSpeechVoxtralModel",
    "FastLongSpeechVoxtralProcessor",
]
