"""What a recording costs is counted on a model without weights; here, once more by hand."""

import shutil

import numpy as np
import pytest
import soundfile
from conftest import tiny_config

from fastlongspeech import FastLongSpeechConfig
from fastlongspeech.app.cost import QWEN2_AUDIO_7B, ModelCost, mel_frames_of, recording_seconds
from fastlongspeech.speed import flops

D, FFN, MELS = 16, 32, 8  # the encoder's sizes in tiny_config
H, MLP, KV, VOCABULARY, LAYERS = 24, 32, 12, 100, 2  # and the language model's
PIECES = 13  # with the blank


@pytest.fixture(scope="module")
def counted() -> ModelCost:
    return ModelCost(FastLongSpeechConfig(**tiny_config(ctc_vocab_size=PIECES - 1)))


def products(*sizes: int) -> int:
    """A multiplication and an addition for every combination."""
    return 2 * int(np.prod(sizes))


def window(mel_frames: int, features: int) -> int:
    """One window with `features` columns given to the first convolution."""
    positions = (mel_frames + 1) // 2
    convolutions = products(MELS, 3, D, features) + products(D, 3, D, (features + 1) // 2)
    layer = 4 * products(D, D, positions) + 2 * products(D, FFN, positions) + 2 * products(positions, positions, D)
    return convolutions + 2 * layer


def language_model(tokens: int, cached: int = 0) -> int:
    linear = 2 * H * H + 2 * H * KV + 3 * H * MLP
    return LAYERS * (products(linear, tokens) + 2 * products(tokens, cached + tokens, H))


def test_a_window_costs_what_its_audio_costs(counted):
    assert counted.window(3000) == window(3000, 3000)
    assert counted.window(1000) == window(1000, 1002)


def test_windows_cost_what_the_longest_of_their_batch_does(counted):
    assert counted.encoder(np.array([3000] * 3)) == 3 * counted.window(3000)
    assert counted.encoder(np.array([3000, 1600])) == 2 * counted.window(3000)
    assert counted.encoder(np.array([3000, 1400])) == counted.window(3000) + counted.window(1400)
    assert counted.encoder(np.array([3000] * 8 + [1600])) == 8 * counted.window(3000) + counted.window(1600)


def test_every_round_asks_the_ctc_decoder_about_every_frame_left(counted):
    rounds = 1000 + 500 + 250  # 1000 frames to 200
    assert counted.fusion(1000, 200)[0] == products(D, PIECES, rounds)
    assert counted.fusion(1000, 200, product=False)[0] == products(D * H + H * PIECES, rounds)
    assert counted.fusion(200, 200) == (0, 0)
    assert counted.fusion(1000, 200, compression="none") == (0, 0)


def test_a_method_without_densities_has_no_ctc_decoder(counted):
    pooled = counted.recording(40.0, target_length=100, compression="average_pooling")
    fused = counted.recording(40.0, target_length=100)
    assert pooled.flops["ctc decoder"] == 0 < pooled.flops["fusion"] < fused.flops["fusion"]
    assert pooled.flops["prefill"] == fused.flops["prefill"]
    with pytest.raises(ValueError, match="compression must be one of iterative_fusion"):
        counted.recording(40.0, compression="tar.gz")


def test_the_fusion_takes_similarities_and_means(counted):
    norms, dots, weighted, sums = 2, 2, 1, 1  # operations on each element of every frame
    quotients = D * (500 + 250 + 200)
    expected = D * (norms + dots + weighted + sums) * (1000 + 500 + 250) + quotients
    assert counted.fusion(1000, 200)[1] == pytest.approx(expected, rel=0.05)  # the rest: one number a frame


def test_uniform_densities_need_no_ctc_decoder():
    config = FastLongSpeechConfig(**tiny_config(ctc_vocab_size=12, content_density="uniform"))
    assert ModelCost(config).fusion(1000, 200)[0] == 0


def test_a_ctc_decoder_without_projector_reads_the_model_s():
    config = FastLongSpeechConfig(**tiny_config(ctc_vocab_size=PIECES - 1, ctc_projector=False))
    assert ModelCost(config).fusion(1000, 500)[0] == products(D * H + H * PIECES, 1000)


def nearly(operations: int) -> object:
    """Older transformers find the angles of rotary positions by a product of matrices: a few operations a token."""
    return pytest.approx(operations, rel=1e-3)


def test_the_language_model_attends_to_all_pairs(counted):
    assert counted.language_model(50) == nearly(language_model(50))
    assert counted.language_model(1, cached=50) == nearly(language_model(1, cached=50))
    assert counted.logits(3) == products(H, VOCABULARY, 3)
    assert counted.projector(50) == products(D, H, 50)


def test_an_answer_is_decoded_token_by_token(counted):
    expected = sum(language_model(1, cached=prompt) + products(H, VOCABULARY, 1) for prompt in range(50, 59))
    assert counted.answer(50, 10) == nearly(expected)
    assert counted.answer(50, 1) == 0


def test_a_recording_is_the_sum_of_its_parts(counted):
    cost = counted.recording(40.0, target_length=100, text_tokens=30, answer_tokens=5)
    assert (cost.seconds, cost.windows, cost.frames, cost.tokens) == (40.0, 2, 1000, 100)
    assert cost.flops["encoder"] == window(3000, 3000) + window(1000, 1002)
    assert cost.flops["prefill"] == nearly(language_model(130) + products(H, VOCABULARY, 1))
    assert cost.flops["answer"] == counted.answer(130, 5)
    assert cost.total == sum(cost.flops.values())
    whole = counted.recording(40.0, compression="none", text_tokens=30, answer_tokens=5)
    assert (whole.tokens, whole.flops["ctc decoder"], whole.flops["fusion"]) == (1000, 0, 0)


def test_a_recording_shorter_than_a_frame_is_refused(counted):
    with pytest.raises(ValueError, match="at least one 40 ms frame, got 0.01"):
        counted.recording(0.01)


def test_mel_frames_are_those_of_the_processor(processor):
    for seconds in (0.04, 1.2345, 29.999, 30, 30.005, 61.3):
        mask = processor(audio=np.zeros(round(16000 * seconds)), sampling_rate=16000)["feature_attention_mask"]
        assert mel_frames_of(seconds).tolist() == mask.sum(1).tolist()


def test_seconds_come_from_the_header(tmp_path, monkeypatch):
    monkeypatch.setattr("fastlongspeech.app.cost.load_recording", None)  # not needed
    soundfile.write(tmp_path / "a.flac", np.zeros((44100, 2)), 44100)
    assert recording_seconds(str(tmp_path / "a.flac")) == 1.0


def test_seconds_are_measured_where_no_header_tells_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.wav"):
        recording_seconds(str(tmp_path / "missing.wav"))
    soundfile.write(tmp_path / "a.flac", np.zeros(32000), 16000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] &= 0xF0  # the number of samples in a FLAC header, 36 bits: 0 is "unknown"
    data[22:26] = bytes(4)
    (tmp_path / "piped.flac").write_bytes(data)
    assert soundfile.info(str(tmp_path / "piped.flac")).frames > 2**62
    if shutil.which("ffmpeg") is None:
        pytest.skip("only ffmpeg reads a FLAC file whose header has no duration")
    assert recording_seconds(str(tmp_path / "piped.flac")) == 2.0


@pytest.mark.slow
def test_the_costs_at_7b_size_are_the_known_ones():
    counted = ModelCost(FastLongSpeechConfig(**QWEN2_AUDIO_7B))
    assert counted.window(3000) == pytest.approx(2.274e12, rel=1e-3)
    attention = 4 * 4096 * 32
    assert counted.language_model(1000) == pytest.approx(12.95e9 * 1000 + attention * 1000**2, rel=1e-3)
    assert counted.logits(1) == pytest.approx(1.278e9, rel=1e-3)
    assert counted.fusion(2, 1, product=False)[0] == pytest.approx(2 * 92.4e6, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["LibriTTS", "Fisher"])
def test_the_paper_s_costs_of_clips_are_counted_to_2_percent(data):
    seconds, text_tokens, schedule, figures = flops.PAPER[data]
    counter = ModelCost(FastLongSpeechConfig(**QWEN2_AUDIO_7B, fusion_schedule=schedule))
    for length, paper in figures.items():
        row = flops.compare(counter, data, seconds, text_tokens, length, paper)
        assert row["reading"] == pytest.approx(paper, rel=0.02)
