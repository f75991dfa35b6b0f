"""The CTC decoder: which piece of text a frame carries, or none, the blank (Eq. 2 and 3 of the paper)."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Most CTC logits to hold at a time when they are reduced to one number per frame; on a CPU about those of one window.
CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**24}


class FastLongSpeechCTCDecoder(nn.Module):
    """Two linear maps from an encoder frame to the CTC vocabulary, the blank last.

    Args:
        config: a host's configuration, which has `FastLongSpeechSettings`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.get_text_config().hidden_size
        self.projector = nn.Linear(config.frame_width, width) if config.ctc_projector else None
        self.linear = nn.Linear(width, config.ctc_blank + 1, bias=False)
        self._product: tuple[Any, Tensor, Tensor] | None = None

    def forward(self, hidden_states: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Returns the logits `(..., V + 1)`, or what `reduce` makes of them, `(...)`.

        With `reduce` the logits are made, unless the decoder trains, from the product of both matrices: a third of
        the work, as there is nothing between them.
        """
        linear, projector = self.linear, self.projector
        plain = _is_plain(linear) and (projector is None or _is_plain(projector))
        if plain:
            hidden_states = hidden_states.to(linear.weight.dtype)
        trains = self.training and linear.weight.requires_grad
        if projector is None:
            logits = linear(hidden_states)
        elif reduce is None or trains or not plain or linear.weight.is_meta:  # meta: offloaded, there when it runs
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


def _is_plain(layer: nn.Module) -> bool:
    """Tells whether a layer holds its weights as numbers that can be multiplied: no integers of a quantised layer."""
    weight = cast(Tensor, layer.weight)
    return type(layer) is nn.Linear and type(weight.data) is Tensor and weight.is_floating_point()


__all__ = ["FastLongSpeechCTCDecoder"]
