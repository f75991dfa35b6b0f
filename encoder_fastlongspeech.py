"""From the windows of recordings to frames: Qwen2-Audio's audio encoder, and the CTC decoder that reads its frames."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from .configuration_fastlongspeech import FastLongSpeechConfig

MEL_FRAMES_PER_FRAME = 4
CPU_MEL_FRAMES = 6000  # of a batch on a CPU: two windows of 30 s are no slower than more, and take less memory
# CTC logits held at a time where only a figure of every frame is wanted; on a CPU those of one window and few more.
CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**24}


class EncodedRecordings(NamedTuple):
    """Every frame of recordings, one recording after the other.

    Attributes:
        frames: `(N, D)`, valid frames before the encoder's last LayerNorm.
        mel_starts: `(N,)` int64 on the CPU, the mel frame of its recording that each begins with.
        lengths: `(A,)` int64 on the CPU, the frames of each recording.
    """

    frames: Tensor
    mel_starts: Tensor
    lengths: Tensor


class FastLongSpeechEncoder(Qwen2AudioEncoder):
    """Qwen2-Audio's encoder up to its last LayerNorm, which reads no more of a window than there is audio."""

    def forward(self, input_features: Tensor, mel_frames: Tensor) -> BaseModelOutput:
        """Returns pooled frames before the LayerNorm, `(W, T, D)`; those past a window's own frames mean nothing.

        Args:
            input_features: log-mel windows `(W, mels, 3000)`.
            mel_frames: `(W,)` integer on the CPU, valid mel frames of each window, 3 or more.
        """
        conv_frames = (mel_frames - 1) // 2 + 1
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

    def encode_recordings(
        self,
        input_features: Tensor,
        feature_attention_mask: Tensor | None,
        windows_per_audio: Tensor | None,
        windows_per_batch: int,
    ) -> EncodedRecordings:
        """Returns the frames of recordings.

        Args:
            input_features: log-mel windows `(W, mels, 3000)`, those of a recording in temporal order.
            feature_attention_mask: `(W, 3000)`, 1 for mel frames that hold audio.
            windows_per_audio: `(A,)` integer, how many windows each recording has; None: one each.
            windows_per_batch: windows encoded at a time, at most; on a CPU, of no more than a minute.

        Raises:
            ValueError: the arguments do not fit each other, or no recording has a frame.
        """
        if feature_attention_mask is None:
            raise ValueError("feature_attention_mask is missing: it says how much of each window is audio.")
        mel_frames = feature_attention_mask.to(torch.int64).sum(-1).cpu()
        windows = torch.ones_like(mel_frames) if windows_per_audio is None else windows_per_audio.cpu()
        total = len(input_features)
        if not total == len(mel_frames) == int(windows.sum()) or bool((windows < 1).any()):
            raise ValueError(
                f"windows_per_audio {windows.tolist()} does not share out the {total} windows of input_features and "
                f"{len(mel_frames)} of feature_attention_mask."
            )
        counts = ((mel_frames - 1) // 2 + 1) // 2

        if not bool(counts.any()):
            raise ValueError("input_features hold no recording as long as one frame (40 ms).")

        # Windows of similar length are encoded together, so that each costs what its audio costs.
        waiting = counts.argsort(descending=True, stable=True)
        waiting = waiting[counts[waiting] > 0]
        first = counts.cumsum(0) - counts
        frames = None
        trains = any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            while len(waiting):
                size = windows_per_batch
                if self.device.type == "cpu":
                    size = min(size, max(1, CPU_MEL_FRAMES // int(mel_frames[waiting[0]])))
                batch = waiting[:size]
                batch = batch[2 * counts[batch] > counts[batch[0]]]
                waiting = waiting[len(batch) :]
                hidden = self(input_features[batch], mel_frames[batch]).last_hidden_state
                row, position = torch.nonzero(torch.arange(hidden.shape[1]) < counts[batch, None], as_tuple=True)
                if frames is None:
                    frames = hidden.new_empty(int(counts.sum()), hidden.shape[2])
                frames[first[batch[row]] + position] = hidden[row, position]
        assert frames is not None

        recording_of = torch.arange(len(windows)).repeat_interleave(windows)
        lengths = torch.zeros_like(windows).scatter_add(0, recording_of, counts)
        mel_starts = mel_frames.cumsum(0) - mel_frames
        mel_starts = mel_starts - mel_starts[windows.cumsum(0) - windows][recording_of]
        index = torch.arange(len(frames)) - first.repeat_interleave(counts)
        mel_starts = mel_starts.repeat_interleave(counts) + MEL_FRAMES_PER_FRAME * index
        return EncodedRecordings(frames, mel_starts, lengths)


class FastLongSpeechCTCDecoder(nn.Module):
    """Two linear maps from an encoder frame to the CTC vocabulary, the blank last."""

    def __init__(self, config: FastLongSpeechConfig) -> None:
        super().__init__()
        width = config.get_text_config().hidden_size
        frame_width = cast(PreTrainedConfig, config.audio_config).d_model
        self.projector = nn.Linear(frame_width, width) if config.ctc_projector else None
        self.linear = nn.Linear(width, config.ctc_blank + 1, bias=False)
        self._product: tuple[Any, Tensor, Tensor] | None = None

    def forward(self, hidden_states: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Returns the logits `(..., V + 1)`, or what `reduce` makes of them, `(...)`.

        With `reduce` the logits are made, unless the decoder trains, from the product of both matrices: a third of
        the work, as there is nothing between them.
        """
        linear, projector = self.linear, self.projector
        hidden_states = hidden_states.to(linear.weight.dtype)
        trains = self.training and linear.weight.requires_grad
        if projector is None:
            logits = linear(hidden_states)
        elif reduce is None or trains or linear.weight.is_meta:  # meta: offloaded, there when the layer runs
            logits = linear(projector(hidden_states))
        else:
            logits = F.linear(hidden_states, *self._multiplied(projector))
        return logits if reduce is None else reduce(logits)

    def by_frame(
        self, frames: Tensor, prepare: Callable[[Tensor], Tensor], reduce: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Returns what `reduce` makes of the logits of frames `(..., D)`, `(...)`; those of some are held at a time.

        `prepare` makes the decoder's input of frames `(N, D)`.
        """
        held = CHUNK_LOGITS.get(frames.device.type, CHUNK_LOGITS["cuda"]) // self.linear.out_features
        chunks = frames.flatten(0, -2).split(max(1, held))
        return torch.cat([self(prepare(chunk), reduce) for chunk in chunks]).view(frames.shape[:-1])

    def loss(
        self, hidden_states: Tensor, lengths: Tensor, ctc_labels: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Returns the CTC loss: nats per label of each recording, averaged over the recordings.

        Args:
            hidden_states: `(N, D)`, the frames of all recordings, one after the other.
            lengths: `(A,)` int64, the frames of each.
            ctc_labels: `(A, S)` int64, pieces of the transcripts, padded with -100.
            num_items_in_batch: divides the summed nats instead, where it is given.
        """
        log_probs = self(hidden_states).log_softmax(dim=-1, dtype=torch.float32)
        log_probs = nn.utils.rnn.pad_sequence(list(log_probs.split(lengths.tolist())))
        ctc_labels = ctc_labels.to(log_probs.device)
        label_lengths = (ctc_labels != -100).sum(-1)
        losses = F.ctc_loss(
            log_probs,
            ctc_labels.clamp(min=0),
            lengths.to(log_probs.device),
            label_lengths,
            blank=self.linear.out_features - 1,
            reduction="none",
            zero_infinity=True,  # a transcript too long for its frames
        )
        if num_items_in_batch is None:
            return (losses / label_lengths.clamp(min=1)).mean()
        return losses.sum() / num_items_in_batch

    def train(self, mode: bool = True) -> "FastLongSpeechCTCDecoder":
        self._product = None  # fused optimizers change weights without a trace
        return super().train(mode)

    @torch.no_grad()
    def _multiplied(self, projector: nn.Linear) -> tuple[Tensor, Tensor]:
        """Both maps as one, multiplied again only where a weight has changed."""
        state = [(p.data_ptr(), None if p.is_inference() else p._version) for p in self.parameters()]
        if self._product is None or self._product[0] != state:
            linear = self.linear.weight
            weight = (linear.float() @ projector.weight.float()).to(linear.dtype)
            bias = (linear.float() @ projector.bias.float()).to(linear.dtype)
            self._product = (state, weight, bias)
        return self._product[1:]


__all__ = ["EncodedRecordings", "FastLongSpeechCTCDecoder", "FastLongSpeechEncoder"]
