"""Qwen2.5-Omni's audio encoder, which reads batches of chunks of 2 s: log-mel chunks to frames."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniAudioEncoderConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoderLayer

from .windows_fastlongspeech import Windows


class FastLongSpeechQwen2_5OmniEncoder(Qwen2_5OmniAudioEncoder):
    """Qwen2.5-Omni's encoder up to its last LayerNorm, for a batch of chunks.

    Attention never leaves a chunk. The stock layers take all chunks in one row and loop over them in each layer; those
    of Qwen2-Audio compute the same with the same parameters, and take a batch.

    Raises:
        ValueError: `n_window` is odd; then the pooling would join frames of two chunks.
    """

    _no_split_modules = ["Qwen2AudioEncoderLayer"]

    def __init__(self, config: Qwen2_5OmniAudioEncoderConfig) -> None:
        if config.n_window % 2:
            raise ValueError(f"audio_config.n_window must be even, got {config.n_window}; released models have 100.")
        super().__init__(config)
        self.layers = nn.ModuleList([Qwen2AudioEncoderLayer(config) for _ in range(config.encoder_layers)])
        self.windows = Windows(mel_frames_per_window=2 * config.n_window)
        self.post_init()

    def forward(self, input_features: Tensor, mel_frames: Tensor) -> BaseModelOutput:
        """Returns pooled frames before the LayerNorm, `(W, T, D)`; those past a chunk's own frames mean nothing.

        Args:
            input_features: log-mel chunks `(W, mels, 200)`.
            mel_frames: `(W,)` integer on the CPU, valid mel frames of each chunk, 3 or more.
        """
        conv_frames = self.windows.convolved(mel_frames)
        longest = int(conv_frames.max())
        weight = self.conv1.weight  # where it is offloaded, a hook moves the input
        input_features = input_features[..., : int(mel_frames.max())]
        input_features = input_features.to(weight.dtype) if weight.is_meta else input_features.to(weight)

        # A chunk ends in zeros, before and after the first convolution, whatever the features hold there.
        columns = torch.arange(input_features.shape[2])
        valid = (columns < mel_frames[:, None])[:, None].to(input_features)
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


__all__ = ["FastLongSpeechQwen2_5OmniEncoder"]
