"""The geometry of recordings: where samples, mel frames and frames lie, and the windows they are cut into.

    samples (16 kHz) -> windows of 30 s -> mel frames (10 ms) -> frames (40 ms)

Everything that counts or places one of these asks here; nothing else knows how long a window is, how far apart windows
begin, or which frames of a window belong to its recording. Windows that overlap would be a change in `cut` and `own`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import numpy as np

MEL_FRAMES = 3000  # of 30 s, by which batches are measured whatever the windows are
CPU_MEL_FRAMES = 6000  # of a batch on a CPU: two windows of 30 s are no slower than more, and take less memory


class FramePlaces(NamedTuple):
    """Where the frames of recordings lie, one recording after the other.

    Attributes:
        first: `(W,)` int64, the first frame of each window that is its recording's own.
        counts: `(W,)` int64, how many frames from there on are.
        lengths: `(A,)` int64, frames of each recording.
        starts: `(N,)` int64, the mel frame of its recording that each frame begins with.
        ends: `(N,)` int64, one past the last mel frame of its recording that each frame stands for.
    """

    first: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class Windows:
    """How a host cuts recordings; the defaults are those of Qwen2-Audio: Whisper's encoder and a pooling by 2.

    A host whose frames lie in another way overrides `count_frames` and `frame_start`.

    Attributes:
        sampling_rate: hertz.
        hop: samples between mel frames.
        mel_frames_per_window: of a whole window, which the encoder reads without looking at its neighbours.
        mel_frames_per_frame: of one frame of the encoder's output: a convolution of stride 2 and the pooling.
    """

    sampling_rate: int = 16_000
    hop: int = 160
    mel_frames_per_window: int = MEL_FRAMES
    mel_frames_per_frame: int = 4

    @property
    def samples(self) -> int:
        """Samples of a whole window."""
        return self.mel_frames_per_window * self.hop

    @property
    def frame_seconds(self) -> float:
        """Seconds a frame stands for before any fusion, 0.04."""
        return self.mel_frames_per_frame * self.hop / self.sampling_rate

    def seconds(self, mel_frames: Any) -> Any:
        """Returns the seconds that so many mel frames last (an integer, an array or a tensor)."""
        return mel_frames * self.hop / self.sampling_rate

    def cut(self, samples: int) -> list[tuple[int, int]]:
        """Returns the first sample of every window of a recording of so many samples, and one past its last."""
        return [(start, min(start + self.samples, samples)) for start in range(0, samples, self.samples)]

    def mel_frames(self, samples: int) -> np.ndarray:
        """Returns the mel frames that hold audio in every window of a recording of so many samples, `(W,)` int64."""
        return np.array([ceil((stop - start) / self.hop) for start, stop in self.cut(samples)], dtype=np.int64)

    def convolved(self, mel_frames: Any) -> Any:
        """Returns the positions that the convolutions make of so many mel frames (integers, an array or a tensor)."""
        return (mel_frames - 1) // 2 + 1

    def count_frames(self, mel_frames: Any) -> Any:
        """Returns the frames that the encoder makes of so many mel frames (integers, an array or a tensor).

        Of 2 mel frames or fewer it makes none.
        """
        return self.convolved(mel_frames) // (self.mel_frames_per_frame // 2)

    def frame_start(self, number: Any) -> Any:
        """Returns the mel frame of its window that a frame begins with, by its number there (integers or an array)."""
        return self.mel_frames_per_frame * number

    def share(self, frames: Any, target_length: Any) -> Any:
        """Returns the frames that recordings of so many keep if 30 s of them keep `target_length`, rounded up.

        Integers or arrays `(A,)`; no recording keeps more frames than it has.
        """
        return np.minimum(frames, -(-frames * target_length * self.mel_frames_per_frame // MEL_FRAMES))

    def own(self, mel_frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first frame of each window that belongs to its recording, and how many do: here all, from 0 on.

        Args:
            mel_frames: `(W,)` integer, mel frames of each window that hold audio.
        """
        counts = self.count_frames(mel_frames).astype(np.int64)
        return np.zeros_like(counts), counts

    def place(self, mel_frames: np.ndarray, windows_per_audio: np.ndarray) -> FramePlaces:
        """Returns where the frames of recordings lie.

        Args:
            mel_frames: `(W,)` integer, mel frames of each window that hold audio, the windows of a recording in order.
            windows_per_audio: `(A,)` integer, windows of each recording.
        """
        first, counts = self.own(mel_frames)
        recording_of = np.arange(len(windows_per_audio)).repeat(windows_per_audio)
        lengths = np.zeros(len(windows_per_audio), dtype=np.int64)
        np.add.at(lengths, recording_of, counts)
        # Where each window begins in its recording: what all windows before it hold, less what earlier recordings do.
        before = mel_frames.cumsum() - mel_frames
        before = before - before[windows_per_audio.cumsum() - windows_per_audio][recording_of]
        number = np.arange(counts.sum()) - (counts.cumsum() - counts).repeat(counts) + first.repeat(counts)
        before = before.repeat(counts)
        starts, ends = before + self.frame_start(number), before + self.frame_start(number + 1)
        return FramePlaces(first, counts, lengths, starts, ends)

    def batches(self, mel_frames: np.ndarray, most: int, on_cpu: bool) -> Iterator[np.ndarray]:
        """Yields the numbers of windows to encode together, the longest first; windows without a frame are left out.

        The windows of a batch are at most twice as long as its shortest, so that each costs what its audio costs.

        Args:
            mel_frames: `(W,)` integer, mel frames of each window that hold audio.
            most: how many times 30 s a batch holds, at most.
            on_cpu: whether a batch is limited to `CPU_MEL_FRAMES` besides.
        """
        most *= MEL_FRAMES // self.mel_frames_per_window
        counts = self.count_frames(mel_frames)
        waiting = np.argsort(-counts, kind="stable")
        waiting = waiting[counts[waiting] > 0]
        while len(waiting):
            size = min(most, max(1, CPU_MEL_FRAMES // int(mel_frames[waiting[0]]))) if on_cpu else most
            batch = waiting[:size]
            batch = batch[2 * counts[batch] > counts[batch[0]]]
            waiting = waiting[len(batch) :]
            yield batch


def summary_intervals(frames: int, interval: int, ratio: int | Sequence[int]) -> list[tuple[int, int, int]]:
    """Returns the intervals of a recording that is summed up: first frame, one past the last, and its ratio.

    The last interval is as short as what is left; nothing is dropped.

    Args:
        frames: of the recording, after any fusion.
        interval: frames of a whole interval.
        ratio: frames for each summary token, one for all intervals or one for each.

    Raises:
        ValueError: a ratio is below 1, or there are fewer than intervals.
    """
    starts = range(0, frames, interval)
    ratios = list(ratio) if isinstance(ratio, Sequence) else [ratio] * len(starts)
    if len(ratios) < len(starts):
        raise ValueError(
            f"compression_ratio must be an integer or one for each of {len(starts)} intervals, got {ratios}."
        )
    if any(type(of_interval) is not int or of_interval < 1 for of_interval in ratios):
        raise ValueError(
            f"compression_ratio must be a positive integer, got {ratio}; 1 is one summary for each frame."
        )
    return [(start, min(start + interval, frames), ratios[number]) for number, start in enumerate(starts)]


def count_summaries(frames: int, interval: int, ratio: int | Sequence[int]) -> int:
    """Returns how many summary tokens a recording gets, the sum of ceil(n / ratio) over its intervals of n frames."""
    return sum(
        ceil((stop - start) / of_interval) for start, stop, of_interval in summary_intervals(frames, interval, ratio)
    )


WINDOWS = Windows()

__all__ = ["WINDOWS", "FramePlaces", "Windows", "count_summaries", "summary_intervals"]
