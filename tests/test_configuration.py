"""The configuration: what it is built from, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import Qwen2AudioConfig

from fastlongspeech import FastLongSpeechConfig


def test_defaults_are_the_papers() -> None:
    config = FastLongSpeechConfig()
    assert (config.ctc_vocab_size, config.ctc_projector, config.ctc_blank) == (10_000, True, 10_000)
    assert (config.content_density, config.compression) == ("ctc", "iterative_fusion")
    assert (config.target_length, config.target_lengths) == (750, [750, 400, 200, 100, 50, 25, 12])
    assert (config.fusion_schedule, config.fusion_ladder) == ("halving", [400, 200, 100, 50, 25, 12])


def test_ctc_vocab_size_0_means_the_vocabulary_of_the_language_model() -> None:
    config = FastLongSpeechConfig(ctc_vocab_size=0, text_config={"model_type": "qwen2", "vocab_size": 77})
    assert config.ctc_blank == 77


@pytest.mark.parametrize("how", ["keywords", "dict", "file"])
def test_is_built_from_any_qwen2_audio_configuration(tmp_path: Path, how: str) -> None:
    stock = Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "d_model": 48},
        text_config={"model_type": "qwen2", "hidden_size": 40},
        audio_token_index=7,
    )
    if how == "keywords":
        config = FastLongSpeechConfig(**stock.to_dict())
    elif how == "dict":
        config = FastLongSpeechConfig.from_dict(stock.to_dict())
    else:
        stock.save_pretrained(tmp_path)
        config = FastLongSpeechConfig.from_pretrained(tmp_path, target_length=9)
        assert config.target_length == 9
    assert config.model_type == config.to_dict()["model_type"] == "fastlongspeech"
    fields = config.to_dict()
    assert (fields["audio_config"]["d_model"], fields["text_config"]["hidden_size"]) == (48, 40)
    assert config.audio_token_id == 7


def test_survives_saving(tmp_path: Path) -> None:
    config = FastLongSpeechConfig(target_lengths=(5, 3), fusion_schedule="ladder", content_density="uniform")
    config.save_pretrained(tmp_path)
    again = FastLongSpeechConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert set(json.loads((tmp_path / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForMultimodalLM",
        "AutoModelForCausalLM",
    }


WRONG: list[tuple[str, Any, str]] = [
    ("target_length", 0, "expected an integer of 1 or more, got 0"),
    ("target_length", 7.5, "expected int, got float"),
    ("target_lengths", [], "expected one or more positive integers"),
    ("target_lengths", [100, 0], "expected one or more positive integers"),
    ("fusion_ladder", [-1], "expected one or more positive integers"),
    ("fusion_schedule", "thirds", "expected one of halving, ladder; got 'thirds'"),
    ("content_density", "ctcc", "expected one of ctc, uniform; got 'ctcc'"),
    ("compression", "zip", "compression must be one of iterative_fusion, .*, none; got 'zip'"),
    ("ctc_vocab_size", -1, "expected an integer of 0 or more, got -1"),
    ("ctc_projector", "yes", "expected bool, got str"),
    ("windows_per_batch", 0, "expected an integer of 1 or more, got 0"),
]


@pytest.mark.parametrize(("field", "value", "sentence"), WRONG)
def test_refuses_wrong_values_at_construction_and_later(field: str, value: Any, sentence: str) -> None:
    with pytest.raises(StrictDataclassError, match=f"(?s){field}.*{sentence}"):
        FastLongSpeechConfig(**{field: value})
    config = FastLongSpeechConfig()
    with pytest.raises(StrictDataclassError, match=f"(?s){field}.*{sentence}"):
        setattr(config, field, value)


def small_context(**text: Any) -> FastLongSpeechConfig:
    return FastLongSpeechConfig(text_config={"model_type": "qwen2", "max_position_embeddings": 2000} | text)


def test_ntk_rope_is_a_copy() -> None:
    config = small_context()
    before = config.to_dict()
    stretched = config.with_ntk_rope(500)
    assert config.to_dict() == before
    plain, rope = (one["text_config"].pop("rope_parameters") for one in (config.to_dict(), stretched.to_dict()))
    assert rope["rope_type"] == "default" and rope["rope_theta"] > 4 * plain["rope_theta"]
    assert small_context().with_ntk_rope(2000).to_dict() == before


@pytest.mark.parametrize("window", [0, -1, 2001])
def test_ntk_rope_refuses_a_window_outside_the_context(window: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and the language model's context of 2000, got {window}"):
        small_context().with_ntk_rope(window)


def test_ntk_rope_refuses_positions_that_are_scaled_already() -> None:
    scaled = small_context(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="have the type 'linear'; NTK-RoPE needs"):
        scaled.with_ntk_rope()


def test_fit_length_is_the_rest_of_the_context() -> None:
    assert small_context().fit_length(1) == 1999
    assert small_context().fit_length(1999) == 1
    with pytest.raises(ValueError, match="other_tokens must leave a frame of .* 2000, got 2000; shorten"):
        small_context().fit_length(2000)
