"""What a recording costs before it is run: floating-point operations, counted on a model without weights.

    fastlongspeech cost interview.mp3 --target-length 400

`ModelCost` builds a model on torch's meta device, where tensors have shapes and no contents, and lets torch count the
operations of its parts: a multiplication and an addition are two. Matrix products, convolutions and attention (all
pairs of positions, masked or not) are counted everywhere; sums, products and means of single elements in the fusion
alone, which consists of them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from ..audio_fastlongspeech import load_recording
from ..compression_fastlongspeech import COMPRESSIONS, check_compression
from ..configuration_fastlongspeech import FastLongSpeechConfig
from ..fusion_fastlongspeech import FusionSettings, content_density
from ..modeling_fastlongspeech import FastLongSpeechForConditionalGeneration
from ..windows_fastlongspeech import WINDOWS

# What Qwen2-Audio's chat template writes around a recording (27 tokens) and a question of a dozen words.
TEXT_TOKENS = 40

# The sizes in config.json of Qwen/Qwen2-Audio-7B-Instruct, on which the paper's models are built; the CTC decoder has
# the 10,000 pieces and the projector of the paper's release, which are the defaults.
QWEN2_AUDIO_7B: dict[str, Any] = {
    "audio_config": {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 128,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "d_model": 1280,
        "max_source_positions": 1500,
    },
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 156_032,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 8192,
    },
    "audio_token_index": 151_646,
}

aten = torch.ops.aten


def _per_result(*_: Any, out_shape: Any = None, **__: Any) -> int:
    return prod(out_shape)


def _per_element(shape: Any, *_: Any, **__: Any) -> int:
    return prod(shape)


# What the fusion does and the counter would pass over.
ELEMENTWISE = {
    aten.mul: _per_result,
    aten.div: _per_result,
    aten.sum: _per_element,
    aten.index_add_: lambda result, dim, index, source, *_, **__: prod(source),
    aten.linalg_vector_norm: lambda shape, *_, **__: 2 * prod(shape),
}


@dataclass(frozen=True)
class Cost:
    """What one recording and a question about it cost.

    Attributes:
        seconds, windows, frames: of the recording, 25 frames a second.
        tokens: frames that are left for the language model.
        flops: floating-point operations by part. `encoder`: the windows through the audio encoder; `ctc decoder`: the
            densities of all frames, in every round (a CPU takes fewer, see `fusion_fastlongspeech.renew_weights`);
            `fusion`: similarities and weighted means, in every round; `projector`: the frames left, to the width of
            the language model; `prefill`: these and the text through the language model, with the logits of the first
            token of the answer; `answer`: its other tokens.
    """

    seconds: float
    windows: int
    frames: int
    tokens: int
    flops: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.flops.values())


class ModelCost:
    """Counts the work of a model of any size; it holds no weights.

    Args:
        config: the model's configuration; `QWEN2_AUDIO_7B` has the fields of one.
    """

    def __init__(self, config: FastLongSpeechConfig) -> None:
        self.config = config
        with torch.device("meta"):
            self.model = FastLongSpeechForConditionalGeneration(copy.deepcopy(config)).eval()
        self.model.set_attn_implementation("eager")  # its products are counted on every device
        self._counts: dict[tuple, int] = {}

    def recording(
        self,
        seconds: float,
        target_length: int | None = None,
        compression: str | None = None,
        text_tokens: int = TEXT_TOKENS,
        answer_tokens: int = 1,
    ) -> Cost:
        """Returns what this package spends on a recording and a question about it.

        Args:
            seconds: its duration, at least that of a frame.
            target_length: L, frames it is fused to; None: configured.
            compression: as in `get_audio_features`; None: configured.
            text_tokens: of the prompt around the recording.
            answer_tokens: length of the answer, 1 or more.

        Raises:
            ValueError: `seconds` or `target_length` is too small, or the compression is unknown.
        """
        if not WINDOWS.frame_seconds <= seconds < float("inf"):
            raise ValueError(f"seconds must be a number of at least one 40 ms frame, got {seconds:g}.")
        mel_frames = mel_frames_of(seconds)
        frames = int(WINDOWS.count_frames(mel_frames).sum())
        target_length = self.config.target_length if target_length is None else target_length
        compression = self.config.compression if compression is None else compression
        check_compression(compression)
        tokens = frames if compression == "none" else min(frames, target_length)
        ctc_decoder, fusion = self.fusion(frames, target_length, compression)
        flops = {
            "encoder": self.encoder(mel_frames),
            "ctc decoder": ctc_decoder,
            "fusion": fusion,
            "projector": self.projector(tokens),
            "prefill": self.language_model(tokens + text_tokens) + self.logits(1),
            "answer": self.answer(tokens + text_tokens, answer_tokens),
        }
        return Cost(seconds, len(mel_frames), frames, tokens, flops)

    def encoder(self, mel_frames: np.ndarray) -> int:
        """Returns the operations of encoding windows of so many mel frames each, in the model's batches."""
        batches = WINDOWS.batches(mel_frames, self.config.windows_per_batch, on_cpu=False)
        return sum(len(batch) * self.window(int(mel_frames[batch].max())) for batch in batches)

    def window(self, mel_frames: int) -> int:
        """Returns the operations of encoding one window with so many mel frames of audio, 3 or more."""
        features = self._empty(1, self._audio.num_mel_bins, WINDOWS.mel_frames_per_window)
        tower = self.model.model.audio_tower
        return self._count_once(("window", mel_frames), lambda: tower(features, torch.tensor([mel_frames])))

    def fusion(
        self,
        frames: int,
        target_length: int | None = None,
        compression: str = "iterative_fusion",
        product: bool = True,
    ) -> tuple[int, int]:
        """Returns the operations of the CTC decoder and of the fusion that shorten a recording.

        Args:
            frames: of the recording, 1 or more.
            target_length, compression: as in `recording`.
            product: whether the CTC decoder's two matrices are one, multiplied when the model was loaded.
        """
        if compression == "none":
            return 0, 0
        model = self.model.model
        one = self._empty(model.ctc_decoder.linear.out_features, self._audio.d_model)

        def density(hidden: Tensor) -> Tensor:
            if self.config.content_density == "uniform":
                return torch.ones(hidden.shape[:-1], device="meta")
            if not self.config.ctc_projector:
                return content_density(model.ctc_decoder(model.multi_modal_projector(hidden)))
            return content_density(F.linear(hidden, one, one[:, 0]) if product else model.ctc_decoder(hidden))

        def compress() -> Any:
            return COMPRESSIONS[compression](
                self._empty(1, frames, self._audio.d_model),
                torch.tensor([frames]),
                self.config.target_length if target_length is None else target_length,
                FusionSettings(density, self.config.fusion_schedule, self.config.fusion_ladder),
            )

        ctc_decoder = self._count(compress)
        return ctc_decoder, self._count(compress, ELEMENTWISE) - ctc_decoder

    def projector(self, frames: int) -> int:
        """Returns the operations of bringing frames to the width of the language model."""
        return self._count(lambda: self.model.model.multi_modal_projector(self._empty(frames, self._audio.d_model)))

    def language_model(self, tokens: int, cached: int = 0) -> int:
        """Returns the operations of the language model for new tokens after cached ones, without logits."""
        text = self.config.get_text_config()
        cache = DynamicCache(config=text)
        for layer in range(text.num_hidden_layers if cached else 0):
            head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            past = self._empty(1, text.num_key_value_heads, cached, head)
            cache.update(past, past, layer)
        embeds = self._empty(1, tokens, text.hidden_size)
        language_model = self.model.model.language_model
        return self._count_once(
            ("language model", tokens, cached), lambda: language_model(inputs_embeds=embeds, past_key_values=cache)
        )

    def logits(self, positions: int) -> int:
        """Returns the operations of the logits of the vocabulary at so many positions."""
        return self._count(
            lambda: self.model.lm_head(self._empty(positions, self.config.get_text_config().hidden_size))
        )

    def answer(self, prompt: int, tokens: int) -> int:
        """Returns the operations of an answer's tokens after the first, which the prefill gives."""
        if tokens < 2:
            return 0
        # Attention grows by the same amount with every token: the mean is that of the first and the last.
        ends = self.language_model(1, prompt) + self.language_model(1, prompt + tokens - 2)
        return (tokens - 1) * (ends + 2 * self.logits(1)) // 2

    @property
    def _audio(self) -> Any:
        return self.config.audio_config

    @staticmethod
    def _empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta")

    def _count_once(self, what: tuple, work: Callable[[], Any]) -> int:
        if what not in self._counts:
            self._counts[what] = self._count(work)
        return self._counts[what]

    @torch.no_grad()
    def _count(self, work: Callable[[], Any], custom: dict[Any, Any] | None = None) -> int:
        with FlopCounterMode(display=False, custom_mapping=custom) as counter:
            work()
        return counter.get_total_flops()


def mel_frames_of(seconds: float) -> np.ndarray:
    """Returns the mel frames of every 30 s window of a recording, `(W,)` int64."""
    return WINDOWS.mel_frames(round(seconds * WINDOWS.sampling_rate))


def recording_seconds(recording: str) -> float:
    """Returns the seconds of a recording, from its header where that tells, else by decoding it.

    Raises:
        FileNotFoundError, ValueError: as `load_recording`.
    """
    if Path(recording).is_file():
        try:
            info = soundfile.info(recording)
        except (soundfile.SoundFileError, TypeError):
            pass  # what ffmpeg may read
        else:
            if 0 < info.frames < 2**62:  # the header of a FLAC that was written to a pipe says 2**63 - 1
                return info.frames / info.samplerate
    return len(load_recording(recording)) / WINDOWS.sampling_rate


__all__ = ["QWEN2_AUDIO_7B", "TEXT_TOKENS", "Cost", "ModelCost", "mel_frames_of", "recording_seconds"]
