"""Qwen3-Omni's thinker as a host: attention inside windows of 8 s (13 Hz), an MLP, and Qwen3 with experts."""

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeAudioEncoder,
    Qwen3OmniMoePreTrainedModel,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerModel,
    Qwen3OmniMoeThinkerTextModel,
    Qwen3OmniMoeVisionEncoder,
)

from .encoder_qwen3_fastlongspeech import QWEN3_WINDOWS, Qwen3Encoder
from .omni_fastlongspeech import OmniForConditionalGeneration, OmniModel, OmniProcessor, OmniSettings

# Qwen3-Omni's own, for text and audio.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}"
    "{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@strict
class FastLongSpeechQwen3OmniConfig(OmniSettings, Qwen3OmniMoeThinkerConfig):
    """Configuration of FastLongSpeech on Qwen3-Omni's thinker; the thinker's or that of the full model is enough."""

    model_type = "fastlongspeech_qwen3_omni"
    vanilla_types = ("qwen3_omni_moe", "qwen3_omni_moe_thinker")
    model_class = "qwen3_omni_fastlongspeech.FastLongSpeechQwen3OmniForConditionalGeneration"
    windows = QWEN3_WINDOWS

    tie_word_embeddings: bool | None = False  # type: ignore[assignment]
    vision_start_token_id: int = 151_652  # for positions beside images; transformers has no default


class FastLongSpeechQwen3OmniEncoder(Qwen3Encoder, Qwen3OmniMoeAudioEncoder):
    """Qwen3-Omni's encoder up to its last LayerNorm, for a batch of windows."""

    _no_split_modules = ["WhisperEncoderLayer"]


class FastLongSpeechQwen3OmniModel(OmniModel, Qwen3OmniMoeThinkerModel):  # type: ignore[misc]
    """Encoders of audio and of what is seen, CTC decoder and language model, without a language modelling head."""

    config: FastLongSpeechQwen3OmniConfig
    _no_split_modules = [
        "WhisperEncoderLayer",
        "Qwen3OmniMoeVisionBlock",
        "Qwen3OmniMoeThinkerTextDecoderLayer",
        "FastLongSpeechCTCDecoder",
    ]

    def __init__(self, config: FastLongSpeechQwen3OmniConfig) -> None:
        Qwen3OmniMoePreTrainedModel.__init__(self, config)
        self.audio_tower = FastLongSpeechQwen3OmniEncoder._from_config(config.audio_config)
        self.visual = Qwen3OmniMoeVisionEncoder._from_config(config.vision_config)
        self.language_model = Qwen3OmniMoeThinkerTextModel._from_config(config.text_config)
        self.spatial_merge_size = config.vision_config.spatial_merge_size  # type: ignore[union-attr]
        self.rope_deltas = None
        self.add_ctc_decoder()

    def project(self, hidden_states: Tensor) -> Tensor:
        tower = self.audio_tower
        return tower.proj2(tower.act(tower.proj1(hidden_states)))


class FastLongSpeechQwen3OmniForConditionalGeneration(
    OmniForConditionalGeneration, Qwen3OmniMoeThinkerForConditionalGeneration
):
    """Answers questions about recordings of any duration, beside images and videos."""

    config: FastLongSpeechQwen3OmniConfig

    def __init__(self, config: FastLongSpeechQwen3OmniConfig) -> None:
        Qwen3OmniMoePreTrainedModel.__init__(self, config)
        self.model = FastLongSpeechQwen3OmniModel(config)
        self.spatial_merge_size = config.vision_config.spatial_merge_size  # type: ignore[union-attr]
        self.add_head()

    def initialize_weights(self) -> None:
        """Makes the weights that a checkpoint lacks; of remote code alone, transformers would forget the experts."""
        self.model.language_model.initialize_weights()
        super().initialize_weights()


class FastLongSpeechQwen3OmniProcessor(OmniProcessor):
    """Turns prompts and recordings of any duration into the model's inputs; see `SpeechProcessor`."""

    config_class = FastLongSpeechQwen3OmniConfig
    template = CHAT_TEMPLATE
    tokens = {
        "audio_token": "<|audio_pad|>",
        "audio_bos_token": "<|audio_start|>",
        "audio_eos_token": "<|audio_end|>",
        "end_of_turn_token": "<|im_end|>",
    }


FastLongSpeechQwen3OmniConfig.register_for_auto_class()
FastLongSpeechQwen3OmniForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = [
    "FastLongSpeechQwen3OmniConfig",
    "FastLongSpeechQwen3OmniForConditionalGeneration",
    "FastLongSpeechQwen3OmniModel",
    "FastLongSpeechQwen3OmniProcessor",
]
