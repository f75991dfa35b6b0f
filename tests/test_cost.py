"""What a recording costs is counted from sizes alone; here once more by hand, and by torch on the whole model."""

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Qwen2AudioConfig

from fastlongspeech import FastLongSpeechConfig, FastLongSpeechForConditionalGeneration
from fastlongspeech.app.cost import ModelCost, mel_frames_of, recording_seconds
from fastlongspeech.app.defaults import QWEN2_AUDIO
from fastlongspeech.app.sizes import QWEN2_AUDIO_7B, Sizes, read_config
from fastlongspeech.fusion_fastlongspeech import FusionSettings, content_density, iterative_fusion
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


class Counted:
    """What torch counts on the whole model, on its meta device, where tensors have shapes and no contents."""

    def __init__(self, config: Any) -> None:
        self.config = config
        with torch.device("meta"):
            self.model = FastLongSpeechForConditionalGeneration(config).eval()
        self.model.set_attn_implementation("eager")  # its products are counted on every device

    def window(self, mel_frames: int) -> int:
        features = self.empty(1, self.config.audio_config.num_mel_bins, 3000)
        return self.count(lambda: self.model.model.audio_tower(features, torch.tensor([mel_frames])))

    def fusion(self, frames: int, length: int) -> tuple[int, int]:
        decoder, width = self.model.model.ctc_decoder, self.config.audio_config.d_model
        pieces = decoder.linear.out_features

        def density(hidden: torch.Tensor) -> torch.Tensor:
            if self.config.content_density == "uniform":
                return self.empty(*hidden.shape[:-1])
            if self.config.ctc_projector:  # one matrix, multiplied when the model was loaded
                return content_density(F.linear(hidden, self.empty(pieces, width), self.empty(pieces)))
            return content_density(decoder(self.model.model.multi_modal_projector(hidden)))

        def fuse() -> Any:
            return iterative_fusion(
                self.empty(1, frames, width),
                torch.tensor([frames]),
                length,
                FusionSettings(density, self.config.fusion_schedule, self.config.fusion_ladder),
            )

        aten = torch.ops.aten
        single_elements: dict[Any, Callable[..., int]] = {
            aten.mul: lambda *_, out_shape, **__: prod(out_shape),
            aten.div: lambda *_, out_shape, **__: prod(out_shape),
            aten.sum: lambda shape, *_, **__: prod(shape),
            aten.index_add_: lambda result, dim, index, source, *_, **__: prod(source),
            aten.linalg_vector_norm: lambda shape, *_, **__: 2 * prod(shape),
        }
        ctc_decoder = self.count(fuse)
        return ctc_decoder, self.count(fuse, single_elements) - ctc_decoder

    def language_model(self, tokens: int, cached: int = 0) -> int:
        text = self.config.get_text_config()
        cache = DynamicCache(config=text)

        def read(positions: int) -> Any:
            embeds = self.empty(1, positions, text.hidden_size)
            return self.model.model.language_model(inputs_embeds=embeds, past_key_values=cache)

        if cached:
            self.count(lambda: read(cached))
        return self.count(lambda: read(tokens))

    def logits(self, positions: int) -> int:
        return self.count(lambda: self.model.lm_head(self.empty(positions, self.config.get_text_config().hidden_size)))

    def projector(self, frames: int) -> int:
        return self.count(
            lambda: self.model.model.multi_modal_projector(self.empty(frames, self.config.audio_config.d_model))
        )

    @staticmethod
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta")

    @staticmethod
    @torch.no_grad()
    def count(work: Callable[[], Any], custom: dict[Any, Any] | None = None) -> int:
        """Older transformers find the angles of rotary positions by a product of matrices, which is left out."""
        with FlopCounterMode(display=False, custom_mapping=custom) as counter:
            work()
        angles = [sum(n.values()) for name, n in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
        return counter.get_total_flops() - sum(angles)


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
    assert counted.fusion(1000, 200, two_matrices=True)[0] == products(D * H + H * PIECES, rounds)
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


def test_the_language_model_attends_to_all_pairs(counted):
    assert counted.language_model(50) == language_model(50)
    assert counted.language_model(1, cached=50) == language_model(1, cached=50)
    assert counted.logits(3) == products(H, VOCABULARY, 3)
    assert counted.projector(50) == products(D, H, 50)


def test_an_answer_is_decoded_token_by_token(counted):
    expected = sum(language_model(1, cached=prompt) + products(H, VOCABULARY, 1) for prompt in range(50, 59))
    assert counted.answer(50, 10) == expected
    assert counted.answer(50, 1) == 0


def test_a_recording_is_the_sum_of_its_parts(counted):
    cost = counted.recording(40.0, target_length=100, text_tokens=30, answer_tokens=5)
    assert (cost.seconds, cost.windows, cost.frames, cost.tokens) == (40.0, 2, 1000, 100)
    assert cost.flops["encoder"] == window(3000, 3000) + window(1000, 1002)
    assert cost.flops["prefill"] == language_model(130) + products(H, VOCABULARY, 1)
    assert cost.flops["answer"] == counted.answer(130, 5)
    assert cost.total == sum(cost.flops.values())
    whole = counted.recording(40.0, compression="none", text_tokens=30, answer_tokens=5)
    assert (whole.tokens, whole.flops["ctc decoder"], whole.flops["fusion"]) == (1000, 0, 0)


TEXTS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, wide heads": {"model_type": "llama", "head_dim": 10},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral, sliding": {"model_type": "mistral", "sliding_window": 16},
    "gemma": {"model_type": "gemma", "head_dim": 8},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "sliding_window": 16, "num_hidden_layers": 3},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": 16,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}


def config_of(text: dict[str, Any], **fields: Any) -> FastLongSpeechConfig:
    parts = tiny_config(ctc_vocab_size=PIECES - 1, **fields)
    return FastLongSpeechConfig(**parts | {"text_config": parts["text_config"] | text})


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_language_models_cost_what_torch_counts(text):
    config = config_of(text)
    ours, torch_s = ModelCost(config), Counted(config)
    assert ours.sizes.language_model() is not None  # by formula
    for tokens, cached in [(1, 0), (50, 0), (1, 10), (1, 50), (7, 50)]:
        assert ours.language_model(tokens, cached) == torch_s.language_model(tokens, cached)
    assert ours.logits(3) == torch_s.logits(3)
    assert ours.projector(5) == torch_s.projector(5)
    first, last = torch_s.language_model(1, 60), torch_s.language_model(1, 68)  # of the 9 tokens after the first
    assert ours.answer(60, 10) == 9 * (first + last) // 2 + 9 * torch_s.logits(1)


@pytest.mark.parametrize("model_type", ["gpt_neox", "qwen3"])
def test_language_models_without_a_formula_are_counted_by_torch(model_type):
    """One whose MLPs have no gate; one whose head_dim is left to the class."""
    parts = tiny_config()
    ours = ModelCost(parts | {"text_config": parts["text_config"] | {"model_type": model_type}})
    assert ours.sizes.language_model() is None
    if model_type == "gpt_neox":
        linear = 4 * H * H + 2 * H * MLP
        assert ours.language_model(5, 7) == LAYERS * (products(linear, 5) + 2 * products(5, 7 + 5, H))
    else:
        same = Counted(config_of({"model_type": model_type, "head_dim": 128}))
        assert ours.language_model(5, 7) == same.language_model(5, 7)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"fusion_schedule": "ladder", "fusion_ladder": [30, 12, 100]},
        {"content_density": "uniform"},
        {"ctc_projector": False},
    ],
    ids=str,
)
def test_encoder_and_fusion_cost_what_torch_counts(fields):
    config = config_of({}, **fields)
    ours, torch_s = ModelCost(config), Counted(config)
    for mel_frames in (3, 4, 5, 1000, 1001, 2997, 2998, 2999, 3000):
        assert ours.window(mel_frames) == torch_s.window(mel_frames)
    for frames, length in [(1, 1), (2, 1), (10, 10), (101, 100), (775, 100), (1000, 13), (1001, 1)]:
        assert ours.fusion(frames, length) == torch_s.fusion(frames, length)


@pytest.mark.parametrize("mel_bins, width", [(80, 32), (128, 48)])
def test_encoders_of_other_sizes_cost_what_torch_counts(mel_bins, width):
    audio = {"num_mel_bins": mel_bins, "d_model": width, "encoder_layers": 3, "encoder_ffn_dim": 40}
    parts = tiny_config()
    config = FastLongSpeechConfig(**parts | {"audio_config": parts["audio_config"] | audio})
    assert ModelCost(config).window(1500) == Counted(config).window(1500)
    assert ModelCost(config).fusion(300, 100) == Counted(config).fusion(300, 100)


def test_a_config_json_is_read_as_the_configuration_s_class_reads_it(checkpoint, tmp_path):
    def read(config: dict[str, Any]) -> tuple[Any, Any]:
        """What the two make of it; missing fields are left to each."""
        (tmp_path / "config.json").write_text(json.dumps(config))
        ours = ModelCost(read_config(str(tmp_path)))
        return ours, ModelCost(FastLongSpeechConfig.from_pretrained(tmp_path))

    saved = json.loads((checkpoint / "config.json").read_text())
    first_release = json.loads((Path(__file__).parent / "data" / "golden" / "config.json").read_text())
    without_projector = first_release | {"ctc_decoder": "llm_embed"}
    published = json.loads(Qwen2AudioConfig(**tiny_config()).to_json_string())  # Qwen2-Audio's own
    leaves_out = {"model_type": "qwen2_audio", "text_config": {"model_type": "qwen2", "vocab_size": 156_032}}
    gemma = json.loads(config_of(TEXTS["gemma3"]).to_json_string(use_diff=False))
    for config in (saved, first_release, without_projector, published, leaves_out, gemma):
        ours, theirs = read(config)
        assert ours.sizes.language_model() is not None
        assert ours.recording(40.0, 100, answer_tokens=5) == theirs.recording(40.0, 100, answer_tokens=5)
        assert ours.recording(40.0).tokens == theirs.recording(40.0).tokens


def test_settings_that_are_left_out_are_the_configuration_s_own():
    ours, theirs = Sizes.of({}), Sizes.of(FastLongSpeechConfig().to_dict())
    assert ours == replace(theirs, text_config={})
    assert ours.language_model() == theirs.language_model()


def test_the_sizes_of_qwen2_audio_7b_need_no_file():
    assert read_config(QWEN2_AUDIO) == QWEN2_AUDIO_7B


def test_another_model_s_config_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds a bert; pass a model of fastlongspeech"):
        read_config(str(tmp_path))


def test_lengths_below_1_are_refused(counted):
    with pytest.raises(ValueError, match="target_length must be a positive integer, got 0"):
        counted.recording(40.0, target_length=0)


def test_a_recording_shorter_than_a_frame_is_refused(counted):
    with pytest.raises(ValueError, match="at least one 40 ms frame, got 0.01"):
        counted.recording(0.01)


def test_mel_frames_are_those_of_the_processor(processor):
    for seconds in (0.04, 1.2345, 29.999, 30, 30.005, 61.3):
        mask = processor(audio=np.zeros(round(16000 * seconds)), sampling_rate=16000)["feature_attention_mask"]
        assert mel_frames_of(seconds).tolist() == mask.sum(1).tolist()


def test_seconds_come_from_the_header(tmp_path, monkeypatch):
    monkeypatch.setattr("fastlongspeech.audio_fastlongspeech.load_recording", None)  # not needed
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
    assert recording_seconds(str(tmp_path / "piped.flac")) == 2.0


def test_no_seconds_are_named_of_a_file_that_is_cut_off(wav):
    wav.write_bytes(wav.read_bytes()[:1000])
    with pytest.raises(ValueError, match="audio is cut off"):
        recording_seconds(str(wav))


def test_the_costs_at_7b_size_are_the_known_ones():
    counted = ModelCost(FastLongSpeechConfig(**QWEN2_AUDIO_7B))
    assert counted.window(3000) == pytest.approx(2.274e12, rel=1e-3)
    attention = 4 * 4096 * 32
    assert counted.language_model(1000) == pytest.approx(12.95e9 * 1000 + attention * 1000**2, rel=1e-3)
    assert counted.logits(1) == pytest.approx(1.278e9, rel=1e-3)
    assert counted.fusion(2, 1, two_matrices=True)[0] == pytest.approx(2 * 92.4e6, rel=1e-3)


@pytest.mark.parametrize("data", ["LibriTTS", "Fisher"])
def test_the_paper_s_costs_of_clips_are_counted_to_2_percent(data):
    seconds, text_tokens, schedule, figures = flops.PAPER[data]
    counter = ModelCost(FastLongSpeechConfig(**QWEN2_AUDIO_7B, fusion_schedule=schedule))
    for length, paper in figures.items():
        row = flops.compare(counter, data, seconds, text_tokens, length, paper)
        assert row["reading"] == pytest.approx(paper, rel=0.02)


# Summaries


def test_a_recording_that_is_summed_up_costs_its_intervals(counted):
    counter = ModelCost(FastLongSpeechConfig(**tiny_config(ctc_vocab_size=PIECES - 1, summary_interval=48)))
    cost = counter.recording(40.0, 75, "summary", text_tokens=30, answer_tokens=5, compression_ratio=4)
    frames = 100  # 75 for each 30 s
    expected, kept = language_model(20), 20
    for interval in (48, 48, 4):
        summaries = interval // 4
        expected += language_model(interval + summaries, cached=kept) + LAYERS * products(H, H + 2 * KV, summaries)
        kept += summaries
    expected += language_model(10, cached=kept) + products(H, VOCABULARY, 1)
    assert (cost.frames, cost.tokens) == (1000, 25)
    assert cost.flops["prefill"] == expected
    assert cost.flops["answer"] == counted.answer(25 + 30, 5)
    assert (cost.flops["ctc decoder"], cost.flops["fusion"]) == counted.fusion(1000, frames)
    assert cost.flops["projector"] == counted.projector(frames)
    assert cost.cache_bytes == (30 + 25 + 4) * LAYERS * 2 * KV * 2


def test_summing_up_costs_what_torch_counts():
    torch.manual_seed(0)
    config = FastLongSpeechConfig(**tiny_config(ctc_vocab_size=PIECES - 1, summary_interval=48))
    model = FastLongSpeechForConditionalGeneration(config).eval().model
    model.set_attn_implementation("eager")
    embeddings, cache = torch.randn(100, H), DynamicCache(config=config.get_text_config())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.read_tokens(cache, embeddings[:20])
        list(model.read_recording(cache, embeddings, 4))
        model.read_tokens(cache, embeddings[:10])
    angles = [sum(n.values()) for name, n in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    assert ModelCost(config).by_intervals(100, 4, text_tokens=30) == counter.get_total_flops() - sum(angles)


def test_an_hour_is_kept_in_an_eighth_of_the_cache():
    counter = ModelCost(QWEN2_AUDIO_7B)
    whole = counter.recording(3600, compression="none")
    summed = counter.recording(3600, compression="summary", compression_ratio=8)
    interval = ModelCost(QWEN2_AUDIO_7B)._text.cache_bytes(720)
    assert summed.tokens == 90_000 // 8
    assert summed.cache_bytes <= whole.cache_bytes / 8 + interval
    assert whole.cache_bytes == (90_000 + 40) * 512 * 1024  # 512 KiB a token


def test_summing_up_is_counted_for_models_that_can():
    text = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 4}
    counter = ModelCost(tiny_config(ctc_vocab_size=PIECES - 1) | {"text_config": text})
    with pytest.raises(ValueError, match='compression="summary" can be counted for language models such as qwen2'):
        counter.recording(40.0, compression="summary")
    assert counter.recording(40.0).cache_bytes is None
