"""The audio encoder of the Qwen3 family: chunks of 1 s through convolutions, attention over windows of 8 s."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from .windows_fastlongspeech import Windows

SECOND = 100  # mel frames


class Qwen3Windows(Windows):
    """The geometry: three convolutions of stride 2 over each second, which make 13 frames of it."""

    def count_frames(self, mel_frames: Any) -> Any:
        rest = mel_frames % SECOND
        for _ in range(3):
            rest = (rest + 1) // 2
        return 13 * (mel_frames // SECOND) + rest

    def frame_start(self, number: Any) -> Any:
        return SECOND * (number // 13) + 8 * (number % 13)


QWEN3_WINDOWS = Qwen3Windows(mel_frames_per_window=8 * SECOND, mel_frames_per_frame=8)


class Qwen3Encoder:
    """The encoder up to its last LayerNorm, for a batch of windows. Mix it in before the host's own class.

    The stock layers take all windows in one row and loop over them in each layer; those of Whisper compute the same
    with the same parameters, and take a batch.

    Raises:
        ValueError: the configuration has other chunks or windows than the released models.
    """

    config: Any
    conv2d1: Any
    conv2d2: Any
    conv2d3: Any
    conv_out: Any
    positional_embedding: Any
    post_init: Any

    def __init__(self, config: Any) -> None:
        parent: Any = super()
        parent.__init__(config)
        window = QWEN3_WINDOWS.mel_frames_per_window
        if 2 * config.n_window != SECOND or config.n_window_infer != window:
            raise ValueError(
                f"audio_config must have n_window {SECOND // 2} and n_window_infer {window}, as released models have, "
                f"got {config.n_window} and {config.n_window_infer}."
            )
        layers = [WhisperEncoderLayer(config) for _ in range(config.encoder_layers)]
        for layer in layers:
            layer.self_attn.k_proj = nn.Linear(config.d_model, config.d_model)  # Whisper's has no bias
        self.layers = nn.ModuleList(layers)
        self.post_init()

    def forward(self, input_features: Tensor, mel_frames: Tensor) -> BaseModelOutput:
        """Returns frames before the LayerNorm, `(W, T, D)`; those past a window's own frames mean nothing.

        Args:
            input_features: log-mel windows `(W, mels, 800)`.
            mel_frames: `(W,)` integer on the CPU, valid mel frames of each window, 1 or more.
        """
        weight = self.conv2d1.weight  # where it is offloaded, a hook moves the input
        input_features = input_features.to(weight.dtype) if weight.is_meta else input_features.to(weight)
        windows, seconds = len(input_features), -(-int(mel_frames.max()) // SECOND)
        chunks = input_features[..., : SECOND * seconds].unflatten(2, (seconds, SECOND)).transpose(1, 2)
        hidden_states = chunks.flatten(0, 1)[:, None]
        for convolution in (self.conv2d1, self.conv2d2, self.conv2d3):
            hidden_states = F.gelu(convolution(hidden_states))
        hidden_states = self.conv_out(hidden_states.permute(0, 3, 1, 2).flatten(2))
        positions = self.positional_embedding.positional_embedding[: hidden_states.shape[1]]
        hidden_states = (hidden_states + positions.to(hidden_states)).unflatten(0, (windows, seconds)).flatten(1, 2)

        counts = QWEN3_WINDOWS.count_frames(mel_frames)
        longest = int(counts.max())
        hidden_states, attention_mask = hidden_states[:, :longest], None
        if int(counts.min()) < longest:
            attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=(torch.arange(longest) < counts[:, None]).to(hidden_states.device),
            )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask)
        return BaseModelOutput(last_hidden_state=hidden_states)


__all__ = ["QWEN3_WINDOWS", "Qwen3Encoder", "Qwen3Windows"]
