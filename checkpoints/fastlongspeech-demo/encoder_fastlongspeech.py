"""Encoders of Whisper's shape, which read no more of a window than there is audio: log-mel windows to frames."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput

from .windows_fastlongspeech import WINDOWS


class WindowEncoder:
    """An encoder up to its last LayerNorm; mix it in before the host's own class."""

    config: Any
    conv1: Any
    conv2: Any
    embed_positions: Any
    layers: Any
    avg_pooler: Any
    dropout: float
    layerdrop: float
    training: bool

    def forward(self, input_features: Tensor, mel_frames: Tensor) -> BaseModelOutput:
        """Returns pooled frames before the LayerNorm, `(W, T, D)`; those past a window's own frames mean nothing.

        Args:
            input_features: log-mel windows `(W, mels, 3000)`.
            mel_frames: `(W,)` integer on the CPU, valid mel frames of each window, 3 or more.
        """
        conv_frames = WINDOWS.convolved(mel_frames)
        longest = int(conv_frames.max())
        # The last valid position of the convolutions sees two mel frames more.
        input_features = input_features[..., : int(mel_frames.max()) + 2]
        weight = self.conv1.weight  # where it is offloaded, a hook moves the input
        input_features = input_features.to(weight.dtype) if weight.is_meta else input_features.to(weight)

        hidden_states = F.gelu(self.conv2(F.gelu(self.conv1(input_features)))).transpose(1, 2)[:, :longest]
        positions = torch.arange(longest, device=hidden_states.device)
        hidden_states = hidden_states + self.embed_positions(positions)
        hidden_states = F.dropout(hidden_states, p=self.dropout, training=self.training)

        attention_mask = None
        if int(conv_frames.min()) < longest:
            attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=positions < conv_frames.to(positions.device)[:, None],
            )
        for layer in self.layers:
            if not (self.training and torch.rand([]) < self.layerdrop):
                hidden_states = layer(hidden_states, attention_mask)
        return BaseModelOutput(last_hidden_state=self.avg_pooler(hidden_states.transpose(1, 2)).transpose(1, 2))


__all__ = ["WindowEncoder"]
