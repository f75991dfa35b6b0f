"""Qwen2.5-Omni's thinker as a host: attention inside chunks of 2 s (25 Hz), a linear projector, and Qwen2.5."""

from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoderConfig,
    Qwen2_5OmniThinkerConfig,
)
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    Qwen2_5OmniPreTrainedModel,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2_5OmniThinkerModel,
    Qwen2_5OmniThinkerTextModel,
    Qwen2_5OmniVisionEncoder,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from .omni_fastlongspeech import OmniForConditionalGeneration, OmniModel, OmniProcessor, OmniSettings
from .windows_fastlongspeech import Windows

CHUNKS = Windows(mel_frames_per_window=200)  # of 2 s; what lies behind one is not read with it

# Qwen2.5-Omni's own, for text and audio.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}"
    "{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@strict
class FastLongSpeechQwen2_5OmniConfig(OmniSettings, Qwen2_5OmniThinkerConfig):
    """Configuration of FastLongSpeech on Qwen2.5-Omni's thinker; the thinker's or that of the full model is enough."""

    model_type = "fastlongspeech_qwen2_5_omni"
    vanilla_types = ("qwen2_5_omni", "qwen2_5_omni_thinker")
    model_class = "qwen2_5_omni_fastlongspeech.FastLongSpeechQwen2_5OmniForConditionalGeneration"
    windows = CHUNKS

    tie_word_embeddings: bool | None = False  # type: ignore[assignment]  # as the thinker says; its text_config says True by default
    vision_start_token_id: int = 151_652  # for positions beside images; transformers has no default


class FastLongSpeechQwen2_5OmniEncoder(Qwen2_5OmniAudioEncoder):
    """Qwen2.5-Omni's encoder up to its last LayerNorm, for a batch of chunks.

    Attention never leaves a chunk. The stock layers take all chunks in one row and loop over them in each layer; those
    of Whisper compute the same with the same parameters, and take a batch.
    """

    _no_split_modules = ["WhisperEncoderLayer"]

    def __init__(self, config: Qwen2_5OmniAudioEncoderConfig) -> None:
        if 2 * config.n_window != CHUNKS.mel_frames_per_window:
            raise ValueError(
                f"audio_config.n_window must be 100, chunks of 2 s, got {config.n_window}; set it to 100."
            )
        super().__init__(config)
        like_whisper: Any = config
        self.layers = nn.ModuleList([WhisperEncoderLayer(like_whisper) for _ in range(config.encoder_layers)])
        self.post_init()

    def forward(self, input_features: Tensor, mel_frames: Tensor) -> BaseModelOutput:
        """Returns pooled frames before the LayerNorm, `(W, T, D)`; those past a chunk's own frames mean nothing.

        Args:
            input_features: log-mel chunks `(W, mels, 200)`.
            mel_frames: `(W,)` integer on the CPU, valid mel frames of each chunk, 3 or more.
        """
        conv_frames = CHUNKS.convolved(mel_frames)
        longest = int(conv_frames.max())
        weight = self.conv1.weight  # where it is offloaded, a hook moves the input
        input_features = input_features[..., : int(mel_frames.max())]
        input_features = input_features.to(weight.dtype) if weight.is_meta else input_features.to(weight)

        # A chunk ends in zeros, before and after the first convolution, whatever the features hold there.
        valid = (torch.arange(input_features.shape[2]) < mel_frames[:, None])[:, None].to(input_features)
        hidden_states = F.gelu(self.conv1(input_features * valid)) * valid
        hidden_states = F.gelu(self.conv2(hidden_states)).transpose(1, 2)
        hidden_states = hidden_states + self.positional_embedding(longest).to(hidden_states)

        attention_mask = None
        if int(conv_frames.min()) < longest:
            attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=(torch.arange(longest) < conv_frames[:, None]).to(hidden_states.device),
            )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask)
        return BaseModelOutput(last_hidden_state=self.avg_pooler(hidden_states.transpose(1, 2)).transpose(1, 2))


class FastLongSpeechQwen2_5OmniModel(OmniModel, Qwen2_5OmniThinkerModel):  # type: ignore[misc]
    """Encoders of audio and of what is seen, CTC decoder and language model, without a language modelling head."""

    config: FastLongSpeechQwen2_5OmniConfig
    _no_split_modules = [
        "WhisperEncoderLayer",
        "Qwen2_5OmniVisionBlock",
        "Qwen2_5OmniDecoderLayer",
        "FastLongSpeechCTCDecoder",
    ]

    def __init__(self, config: FastLongSpeechQwen2_5OmniConfig) -> None:
        Qwen2_5OmniPreTrainedModel.__init__(self, config)
        self.audio_tower = FastLongSpeechQwen2_5OmniEncoder._from_config(config.audio_config)
        self.visual = Qwen2_5OmniVisionEncoder._from_config(config.vision_config)
        self.language_model = Qwen2_5OmniThinkerTextModel._from_config(config.text_config)
        self.spatial_merge_size = config.vision_config.spatial_merge_size  # type: ignore[union-attr]
        self.rope_deltas = None
        self.add_ctc_decoder()

    def project(self, hidden_states: Tensor) -> Tensor:
        return self.audio_tower.proj(hidden_states)


class FastLongSpeechQwen2_5OmniForConditionalGeneration(
    OmniForConditionalGeneration, Qwen2_5OmniThinkerForConditionalGeneration
):
    """Answers questions about recordings of any duration, beside images and videos."""

    config: FastLongSpeechQwen2_5OmniConfig

    def __init__(self, config: FastLongSpeechQwen2_5OmniConfig) -> None:
        Qwen2_5OmniPreTrainedModel.__init__(self, config)
        self.model = FastLongSpeechQwen2_5OmniModel(config)
        self.spatial_merge_size = config.vision_config.spatial_merge_size  # type: ignore[union-attr]
        self.add_head()


class FastLongSpeechQwen2_5OmniProcessor(OmniProcessor):
    """Turns prompts and recordings of any duration into the model's inputs; see `SpeechProcessor`."""

    config_class = FastLongSpeechQwen2_5OmniConfig
    template = CHAT_TEMPLATE
    tokens = {
        "audio_token": "<|AUDIO|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
        "end_of_turn_token": "<|im_end|>",
    }


FastLongSpeechQwen2_5OmniConfig.register_for_auto_class()
FastLongSpeechQwen2_5OmniForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = [
    "FastLongSpeechQwen2_5OmniConfig",
    "FastLongSpeechQwen2_5OmniForConditionalGeneration",
    "FastLongSpeechQwen2_5OmniModel",
    "FastLongSpeechQwen2_5OmniProcessor",
]
