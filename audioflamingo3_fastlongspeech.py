"""Audio Flamingo 3 as a host: Whisper's encoder in 30 s windows, a pooling by 2 (25 Hz), an MLP, and Qwen2."""

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoModel
from transformers.models.audioflamingo3.configuration_audioflamingo3 import AudioFlamingo3Config
from transformers.models.audioflamingo3.modeling_audioflamingo3 import (
    AudioFlamingo3Encoder,
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3Model,
    AudioFlamingo3MultiModalProjector,
    AudioFlamingo3PreTrainedModel,
)

from .encoder_fastlongspeech import WindowEncoder
from .host_fastlongspeech import HostForConditionalGeneration, HostModel
from .processor_fastlongspeech import SpeechProcessor
from .settings_fastlongspeech import FastLongSpeechSettings

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}"
    "{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'audio' %}<sound>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@strict
class FastLongSpeechAudioFlamingo3Config(FastLongSpeechSettings, AudioFlamingo3Config):
    """Configuration of FastLongSpeech on Audio Flamingo 3; one of Audio Flamingo 3 is enough."""

    model_type = "fastlongspeech_audioflamingo3"
    vanilla_types = ("audioflamingo3",)
    model_class = "audioflamingo3_fastlongspeech.FastLongSpeechAudioFlamingo3ForConditionalGeneration"

    tie_word_embeddings: bool | None = False  # as Audio Flamingo 3's head


class FastLongSpeechAudioFlamingo3Encoder(WindowEncoder, AudioFlamingo3Encoder):
    """Audio Flamingo 3's encoder up to its last LayerNorm, which reads no more of a window than there is audio."""


class FastLongSpeechAudioFlamingo3Model(HostModel, AudioFlamingo3Model):
    """Audio encoder, CTC decoder, projector and language model, without a language modelling head."""

    config: FastLongSpeechAudioFlamingo3Config
    _no_split_modules = ["AudioFlamingo3EncoderLayer", "FastLongSpeechCTCDecoder"]

    def __init__(self, config: FastLongSpeechAudioFlamingo3Config) -> None:
        AudioFlamingo3PreTrainedModel.__init__(self, config)
        self.audio_tower = FastLongSpeechAudioFlamingo3Encoder._from_config(config.audio_config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.multi_modal_projector = AudioFlamingo3MultiModalProjector(config)
        self.add_ctc_decoder()

    def encode_windows(self, input_features: Tensor, mel_frames: Tensor) -> Tensor:
        return self.audio_tower(input_features, mel_frames).last_hidden_state

    def normalise(self, frames: Tensor) -> Tensor:
        return self.audio_tower.layer_norm(frames)

    def project(self, hidden_states: Tensor) -> Tensor:
        return self.multi_modal_projector(hidden_states)


class FastLongSpeechAudioFlamingo3ForConditionalGeneration(
    HostForConditionalGeneration, AudioFlamingo3ForConditionalGeneration
):
    """Answers questions about recordings of any duration."""

    config: FastLongSpeechAudioFlamingo3Config

    def __init__(self, config: FastLongSpeechAudioFlamingo3Config) -> None:
        AudioFlamingo3PreTrainedModel.__init__(self, config)
        self.model = FastLongSpeechAudioFlamingo3Model(config)
        self.add_head()


class FastLongSpeechAudioFlamingo3Processor(SpeechProcessor):
    """Turns prompts and recordings of any duration into the model's inputs; see `SpeechProcessor`."""

    config_class = FastLongSpeechAudioFlamingo3Config
    template = CHAT_TEMPLATE
    tokens = {"audio_token": "<sound>", "end_of_turn_token": "<|im_end|>"}


FastLongSpeechAudioFlamingo3Config.register_for_auto_class()
FastLongSpeechAudioFlamingo3ForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = [
    "FastLongSpeechAudioFlamingo3Config",
    "FastLongSpeechAudioFlamingo3ForConditionalGeneration",
    "FastLongSpeechAudioFlamingo3Model",
    "FastLongSpeechAudioFlamingo3Processor",
]
