"""The geometry of recordings, against the feature extractor and plain loops."""

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from fastlongspeech.windows_fastlongspeech import WINDOWS


@pytest.mark.parametrize("samples", [1, 160, 161, 479_999, 480_000, 480_001, 1_000_000])
def test_windows_have_the_mel_frames_that_the_feature_extractor_makes(samples: int) -> None:
    extractor = WhisperFeatureExtractor(feature_size=80)
    cuts = WINDOWS.cut(samples)
    assert cuts[0][0] == 0 and cuts[-1][1] == samples
    assert all(before[1] == after[0] for before, after in zip(cuts, cuts[1:], strict=False))
    masks = [
        extractor(np.zeros(stop - start), sampling_rate=16_000, return_attention_mask=True)["attention_mask"][0]
        for start, stop in cuts
    ]
    assert WINDOWS.mel_frames(samples).tolist() == [int(np.sum(mask)) for mask in masks]


def test_frames_of_any_number_of_mel_frames() -> None:
    """A convolution of kernel 3, padding 1 and stride 2, then a mean of every two positions, as the stock encoder."""
    for mel_frames in range(1, 3001):
        convolved = len(range(0, mel_frames, 2))
        assert WINDOWS.count_frames(mel_frames) == convolved // 2


def test_places_by_a_loop_over_windows() -> None:
    mel_frames, windows = np.array([3000, 700, 2, 9, 3000, 4]), np.array([2, 1, 3])
    places = WINDOWS.place(mel_frames, windows)
    starts, lengths, window = [], [], 0
    for count in windows:
        begins, frames = 0, 0
        for number in range(window, window + count):
            of_window = int(WINDOWS.count_frames(int(mel_frames[number])))
            starts += [begins + 4 * frame for frame in range(of_window)]
            begins, frames = begins + int(mel_frames[number]), frames + of_window
        lengths.append(frames)
        window += count
    assert places.starts.tolist() == starts and places.ends.tolist() == [start + 4 for start in starts]
    assert places.lengths.tolist() == lengths == [925, 0, 753]
    assert WINDOWS.seconds(places.starts)[:3].tolist() == [0, 0.04, 0.08]


def test_batches_hold_every_window_with_a_frame_once() -> None:
    mel_frames = np.random.default_rng(0).integers(1, 3000, 60)
    batches = list(WINDOWS.batches(mel_frames, most=8, on_cpu=True))
    assert sorted(np.concatenate(batches)) == [n for n, mel in enumerate(mel_frames) if mel > 2]
    for batch in batches:
        assert len(batch) <= 8 and (len(batch) == 1 or mel_frames[batch].max() * len(batch) <= 6000)
        assert 2 * WINDOWS.count_frames(mel_frames[batch]).min() > WINDOWS.count_frames(mel_frames[batch]).max()


def test_seconds() -> None:
    assert (WINDOWS.samples, WINDOWS.frame_seconds, WINDOWS.seconds(3000)) == (480_000, 0.04, 30)
