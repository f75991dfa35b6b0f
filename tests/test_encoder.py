"""Windows to frames as the stock encoder makes them, at the cost of their audio; the CTC decoder's short cut."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration

from fastlongspeech import FastLongSpeechForConditionalGeneration, ctc_fastlongspeech, windows_fastlongspeech

Model = FastLongSpeechForConditionalGeneration
Inputs = dict[str, Tensor]
Make = Callable[..., Any]


def stock_frames(stock: Qwen2AudioForConditionalGeneration, audio: Inputs) -> list[Tensor]:
    """Every window's valid frames before the last LayerNorm, by the stock encoder at 30 s with padding masked."""
    tower = stock.model.audio_tower
    before_norm: list[Tensor] = []
    hook = tower.layer_norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    frames = []
    for features, mask in zip(audio["input_features"], audio["feature_attention_mask"], strict=True):
        conv_frames, count = tower._get_feat_extract_output_lengths(mask.sum())
        bias = torch.zeros(1, 1, 1500, 1500).masked_fill(torch.arange(1500) >= conv_frames, -torch.inf)
        tower(features[None], attention_mask=bias)
        frames.append(before_norm.pop()[0, :count])
    hook.remove()
    return frames


@pytest.mark.parametrize(("windows_per_batch", "mel_frames"), [(1, 6000), (8, 6000), (3, 30_000), (8, 30_000)])
def test_windows_of_any_length_are_encoded_as_the_stock_encoder_does(
    model: Model,
    stock: Qwen2AudioForConditionalGeneration,
    make_audio: Make,
    monkeypatch: pytest.MonkeyPatch,
    windows_per_batch: int,
    mel_frames: int,
) -> None:
    """Odd lengths, a full window, and partial windows that are not the last of their recording."""
    monkeypatch.setattr(windows_fastlongspeech, "CPU_MEL_FRAMES", mel_frames)
    model.model.audio_tower.load_state_dict(stock.model.audio_tower.state_dict())
    model.config.windows_per_batch = windows_per_batch
    audio = make_audio([5], [503, 1001], [3000, 4, 7], [2999], [3], [2998, 258])
    with torch.no_grad():
        recordings = model.encode(**audio)
        expected = stock_frames(stock, audio)
    counts = [len(window) for window in expected]
    assert counts == [1, 126, 250, 750, 1, 2, 750, 1, 749, 64]
    assert recordings.lengths.tolist() == [1, 376, 753, 750, 1, 813]
    torch.testing.assert_close(recordings.frames, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.fixture
def read(model: Model) -> list[tuple[int, ...]]:
    """The windows and positions (50 Hz) of every batch that the encoder reads from here on."""
    shapes: list[tuple[int, ...]] = []
    layer = model.model.audio_tower.layers[0]
    layer.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    return shapes


def test_an_encoder_window_reads_no_more_than_its_audio(
    model: Model, make_audio: Make, read: list[tuple[int, ...]]
) -> None:
    model.get_audio_features(**make_audio([500], [3000], [490], [2000, 20]))
    assert sorted(read) == [(1, 10), (2, 250), (2, 1500)]


def test_a_cpu_reads_no_more_than_a_minute_at_a_time(
    model: Model, make_audio: Make, read: list[tuple[int, ...]]
) -> None:
    model.get_audio_features(**make_audio([3000, 3000, 3000], [1000] * 7))
    assert read == [(2, 1500), (1, 1500), (6, 500), (1, 500)]


def test_the_density_is_the_same_by_one_matrix_a_few_frames_at_a_time(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the product is made again when a weight changes."""
    frames = torch.randn(2, 33, 16)
    for _ in range(2):
        hidden = model.model.audio_tower.layer_norm(frames)
        exact = 1 - model.model.ctc_decoder(hidden).double().softmax(-1)[..., -1]
        torch.testing.assert_close(model.density(frames).double(), exact, rtol=1e-5, atol=1e-6)
        monkeypatch.setitem(ctc_fastlongspeech.CHUNK_LOGITS, "cpu", 100)
        torch.nn.init.normal_(model.model.ctc_decoder.projector.weight)
