"""What a recording costs before it is run: floating-point operations, counted from the sizes of the model alone.

    fastlongspeech cost interview.mp3 --target-length 400

A multiplication and an addition are two operations. Matrix products, convolutions and attention (all pairs of
positions, masked or not) are counted everywhere; sums, products and means of single elements in the fusion alone,
which consists of them. The numbers are those of torch's own counter on a model without weights, which is asked only
where there is no formula: for other compressions than iterative fusion, and for uncommon language models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..decoding_fastlongspeech import recording_seconds as file_seconds
from ..windows_fastlongspeech import WINDOWS, count_summaries, summary_intervals
from .hosts import QWEN2_AUDIO, host_of
from .sizes import Sizes, product

# What Qwen2-Audio's chat template writes around a recording (27 tokens) and a question of a dozen words.
TEXT_TOKENS = 40
BEFORE = 20  # of these, how many stand before the recording
INTERVAL = 720  # frames that are summed up together by a model that says no number of its own
TAPS = 3  # columns that each convolution of the encoder reads at a time


@dataclass(frozen=True)
class Cost:
    """What one recording and a question about it cost.

    Attributes:
        seconds, windows, frames: of the recording; Qwen2-Audio makes 25 frames a second.
        tokens: of the recording, that the language model keeps: frames that are left, or summary tokens.
        cache_bytes: of the language model's cache after the answer, 2 for each number; None where its layers are not
            known.
        flops: floating-point operations by part. `encoder`: the windows through the audio encoder; `ctc decoder`: the
            densities of all frames, in every round (a CPU takes fewer, see `fusion_fastlongspeech.renew_weights`);
            `fusion`: similarities and weighted means, in every round; `projector`: the frames left, to the width of
            the language model; `prefill`: these and the text through the language model, with the logits of the first
            token of the answer; `answer`: its other tokens. With `"summary"` the prefill goes by intervals.
    """

    seconds: float
    windows: int
    frames: int
    tokens: int
    cache_bytes: int | None
    flops: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.flops.values())


class ModelCost:
    """Counts the work of a model of any size.

    Args:
        config: its configuration, of any host, or what its config.json holds; `QWEN2_AUDIO_7B` is one.
    """

    def __init__(self, config: Any) -> None:
        fields = config if isinstance(config, Mapping) else config.to_dict()
        self._host: Any = None
        if "model_type" not in fields or host_of(fields) is QWEN2_AUDIO:
            self.windows, self.sizes = WINDOWS, Sizes.of(fields)
        else:
            from .counting import CountedHost  # loads torch

            self._host = CountedHost(fields)
            self.windows, self.sizes = self._host.config.windows, self._host.sizes
        self._text: Any = self.sizes.language_model()
        if self._text is None and self._host is not None:
            self._text = self._host.language_model()
        elif self._text is None:
            from .counting import CountedLanguageModel  # loads torch

            self._text = CountedLanguageModel(self.sizes.text_config)

    def recording(
        self,
        seconds: float,
        target_length: int | None = None,
        compression: str | None = None,
        text_tokens: int = TEXT_TOKENS,
        answer_tokens: int = 1,
        compression_ratio: int | None = None,
    ) -> Cost:
        """Returns what this package spends on a recording and a question about it.

        Args:
            seconds: its duration, at least that of a frame.
            target_length: L, frames it is fused to; None: configured.
            compression: as in `get_audio_features`; None: configured.
            text_tokens: of the prompt around the recording.
            answer_tokens: length of the answer, 1 or more.
            compression_ratio: with `"summary"`, frames for each summary token; None: configured.

        Raises:
            ValueError: `seconds`, `target_length` or the ratio is too small, or the compression is unknown.
        """
        windows = self.windows
        if not windows.frame_seconds <= seconds < float("inf"):
            frame = f"{1000 * windows.frame_seconds:.0f} ms frame"
            raise ValueError(f"seconds must be a number of at least one {frame}, got {seconds:g}.")
        mel_frames = windows.mel_frames(round(seconds * windows.sampling_rate))
        frames = int(windows.own(mel_frames)[1].sum())
        target_length = self.sizes.target_length if target_length is None else target_length
        compression = self.sizes.compression if compression is None else compression
        read = frames if compression == "none" else min(frames, target_length)
        if compression == "summary":
            read = int(windows.share(frames, target_length))
        ctc_decoder, fusion = self.fusion(
            frames, read, "iterative_fusion" if compression == "summary" else compression
        )
        if compression == "summary":
            ratio = self.sizes.compression_ratio if compression_ratio is None else compression_ratio
            tokens = count_summaries(read, self.sizes.summary_interval or INTERVAL, ratio)
            prefill = self.by_intervals(read, ratio, text_tokens)
        else:
            tokens, prefill = read, self.language_model(read + text_tokens)
        flops = {
            "encoder": self.encoder(mel_frames),
            "ctc decoder": ctc_decoder,
            "fusion": fusion,
            "projector": self.projector(read),
            "prefill": prefill + self.logits(1),
            "answer": self.answer(tokens + text_tokens, answer_tokens),
        }
        cached = tokens + text_tokens + answer_tokens - 1
        cache_bytes = None if self.sizes.language_model() is None else self._text.cache_bytes(cached)
        return Cost(seconds, len(mel_frames), frames, tokens, cache_bytes, flops)

    def encoder(self, mel_frames: np.ndarray) -> int:
        """Returns the operations of encoding windows of so many mel frames each, in the model's batches."""
        batches = self.windows.batches(mel_frames, self.sizes.windows_per_batch, on_cpu=False)
        return sum(len(batch) * self.window(int(mel_frames[batch].max())) for batch in batches)

    def window(self, mel_frames: int) -> int:
        """Returns the operations of encoding one window with so many mel frames of audio, 3 or more."""
        if self._host is not None:
            return self._host.window(mel_frames)
        sizes = self.sizes
        # The last position of audio sees two mel frames more, so the convolutions read these as well.
        columns = min(WINDOWS.mel_frames_per_window, mel_frames + 2)
        convolutions = product(sizes.mel_bins, TAPS, sizes.width, columns)
        convolutions += product(sizes.width, TAPS, sizes.width, WINDOWS.convolved(columns))
        positions = WINDOWS.convolved(mel_frames)
        linear = 4 * sizes.width * sizes.width + 2 * sizes.width * sizes.mlp
        layer = product(linear, positions) + 2 * product(positions, positions, sizes.width)
        return convolutions + sizes.layers * layer

    def fusion(
        self,
        frames: int,
        target_length: int | None = None,
        compression: str = "iterative_fusion",
        two_matrices: bool = False,
    ) -> tuple[int, int]:
        """Returns the operations of the CTC decoder and of the fusion that shorten a recording.

        Args:
            frames: of the recording, 1 or more.
            target_length, compression: as in `recording`.
            two_matrices: whether the CTC decoder's matrices are applied one after the other; otherwise they are one,
                multiplied when the model was loaded.

        Raises:
            ValueError: `target_length` is below 1, or the compression is unknown.
        """
        sizes = self.sizes
        target_length = sizes.target_length if target_length is None else target_length
        if compression == "none":
            return 0, 0
        if compression != "iterative_fusion" or target_length < 1:
            from .counting import compression_work  # loads torch

            asked, fusion = compression_work(
                compression, sizes.width, frames, target_length, sizes.fusion_schedule, sizes.fusion_ladder
            )
        else:
            lengths = fusion_lengths(frames, target_length, sizes.fusion_schedule, sizes.fusion_ladder)
            asked = sum(lengths[:-1])  # in every round, every frame that is there
            fusion = sum(map(self._round, lengths[:-1], lengths[1:]))
            if sizes.fusion_schedule == "halving":
                fusion += len(lengths) - 1  # L is doubled in every round, to be compared with the length
        if sizes.content_density == "uniform" or not sizes.ctc_trained:
            return 0, fusion
        pieces = (sizes.ctc_vocab_size or self._text.vocabulary) + 1  # the blank
        if sizes.ctc_projector and not two_matrices:
            return product(sizes.width, pieces, asked), fusion
        first = product(sizes.width, self._text.width, asked) if sizes.ctc_projector else self.projector(asked)
        return first + product(self._text.width, pieces, asked), fusion

    def _round(self, frames: int, spans: int) -> int:
        """Returns the operations of a round of fusion beside its densities."""
        width = self.sizes.width
        norms, dots, quotients = 2 * frames * width, 2 * (frames - 1) * width, 2 * (frames - 1)
        # Densities are summed twice: to see whether a span has any, and to divide by. What lies past the last span is
        # one span more.
        means = 2 * frames + 2 * frames * width + (spans + 1) * width
        return norms + dots + quotients + means

    def projector(self, frames: int) -> int:
        """Returns the operations of bringing frames to the width of the language model."""
        if self._host is not None:
            return self._host.projector(frames)
        return product(self.sizes.width, self._text.width, frames)

    def language_model(self, tokens: int, cached: int = 0) -> int:
        """Returns the operations of the language model for new tokens after cached ones, without logits."""
        return self._text.forward(tokens, cached)

    def by_intervals(self, frames: int, ratio: int, text_tokens: int = TEXT_TOKENS) -> int:
        """Returns the operations of the language model for a recording that it sums up, and the text around it.

        Args:
            frames: that it reads.
            ratio: frames for each summary token.
            text_tokens: of which `BEFORE` are read before the recording, if there are as many.

        Raises:
            ValueError: the ratio is below 1, or the language model is none that can sum up.
        """
        if self.sizes.language_model() is None:
            raise ValueError(
                'compression="summary" can be counted for language models such as qwen2 and llama, got '
                f"{self.sizes.text_config.get('model_type')!r}; take another compression."
            )
        kept = min(BEFORE, text_tokens)
        operations = self.language_model(kept)
        for start, stop, _ in summary_intervals(frames, self.sizes.summary_interval or INTERVAL, ratio):
            summaries = -(-(stop - start) // ratio)
            operations += self.language_model(stop - start + summaries, kept) + self._text.summary_projections(
                summaries
            )
            kept += summaries
        return operations + self.language_model(text_tokens - min(BEFORE, text_tokens), kept)

    def logits(self, positions: int) -> int:
        """Returns the operations of the logits of the vocabulary at so many positions."""
        return product(self._text.width, self._text.vocabulary, positions)

    def answer(self, prompt: int, tokens: int) -> int:
        """Returns the operations of an answer's tokens after the first, which the prefill gives."""
        if tokens < 2:
            return 0
        # Attention grows by the same amount with every token: the mean is that of the first and the last.
        ends = self.language_model(1, prompt) + self.language_model(1, prompt + tokens - 2)
        return (tokens - 1) * (ends + 2 * self.logits(1)) // 2


def fusion_lengths(frames: int, target_length: int, schedule: str, ladder: Sequence[int]) -> list[int]:
    """Returns the lengths that iterative fusion takes a recording through, Eq. 5, the first and the last included.

    As `fusion_fastlongspeech.next_lengths` says it for batches.
    """
    lengths = [frames]
    while (length := lengths[-1]) > target_length:
        if schedule == "halving":
            lengths.append(length // 2 if length > 2 * target_length else target_length)
        else:
            lengths.append(max([target_length, *(rung for rung in ladder if target_length < rung < length)]))
    return lengths


def mel_frames_of(seconds: float) -> np.ndarray:
    """Returns the mel frames of every 30 s window of a recording, `(W,)` int64."""
    return WINDOWS.mel_frames(round(seconds * WINDOWS.sampling_rate))


def recording_seconds(recording: str) -> float:
    """Returns the seconds of a recording, from its header where that tells, else by decoding it.

    Raises:
        FileNotFoundError, ValueError: as `load_recording`.
    """
    if Path(recording).is_file():
        return file_seconds(recording, recording)
    from ..audio_fastlongspeech import load_recording  # loads more than a header takes

    return len(load_recording(recording)) / WINDOWS.sampling_rate


__all__ = ["TEXT_TOKENS", "Cost", "ModelCost", "mel_frames_of", "recording_seconds"]
