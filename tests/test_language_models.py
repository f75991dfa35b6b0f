"""Any language model of transformers and any size of encoder: heads, ties and logits are those of its own class."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AUDIO_TOKEN, MEL_BINS, tiny_config
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
)

from fastlongspeech import FastLongSpeechConfig, FastLongSpeechForConditionalGeneration

Model = FastLongSpeechForConditionalGeneration
Make = Callable[..., Any]

SIZES = {
    "vocab_size": 100,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Gemma, Cohere and GPT-2 are tied by their own default; a window of 8 is shorter than the prompts of the tests.
GEMMA: dict[str, Any] = {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "llama": {"model_type": "llama"},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "qwen3, tied": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "gemma": {"model_type": "gemma", "head_dim": 8},
    "gemma 2": {"model_type": "gemma2", **GEMMA},
    "gemma 3": {"model_type": "gemma3_text", **GEMMA},
    "cohere": {"model_type": "cohere", "logit_scale": 0.25},
    "granite": {"model_type": "granite", "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "gpt2": {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 4},
}
TIED = {name for name in LANGUAGE_MODELS if "tied" in name} | {"gemma", "gemma 2", "gemma 3", "cohere", "gpt2"}

each = pytest.mark.parametrize("name", LANGUAGE_MODELS)


def with_language_model(name: str) -> tuple[Model, PreTrainedModel]:
    """A tiny model, and transformers' own class with the same language model and head."""
    text_config = SIZES | LANGUAGE_MODELS[name]
    torch.manual_seed(0)
    own: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text_config)).eval()
    fields = tiny_config(ctc_vocab_size=12) | {"text_config": text_config}
    model = Model(FastLongSpeechConfig(**fields)).eval()
    model.model.language_model.load_state_dict(own.base_model.state_dict())
    if name not in TIED:
        model.lm_head.load_state_dict(own.get_output_embeddings().state_dict())
    model.generation_config.eos_token_id = None
    return model, own


@each
def test_text_has_the_logits_of_the_language_models_own_class(name: str) -> None:
    model, own = with_language_model(name)
    ids = torch.randint(3, AUDIO_TOKEN, (2, 30))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, own(input_ids=ids).logits)


@each
def test_a_head_is_tied_where_the_language_model_ties_it(name: str, tmp_path: Path) -> None:
    model, own = with_language_model(name)
    assert (own.get_output_embeddings().weight is own.get_input_embeddings().weight) == (name in TIED)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (name in TIED)

    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (name not in TIED)
    again, info = Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == (name in TIED)
    ids = torch.randint(3, AUDIO_TOKEN, (1, 9))
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_outer_configuration_may_tie_as_well() -> None:
    """As in a configuration of transformers, where `tie_word_embeddings` stands outside."""
    fields = tiny_config(ctc_vocab_size=12, tie_word_embeddings=True)
    model = Model(FastLongSpeechConfig(**fields))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.get_text_config().tie_word_embeddings


@each
def test_recordings_in_a_batch_give_what_each_gives_alone(name: str, make_audio: Make, make_prompts: Make) -> None:
    model, _ = with_language_model(name)
    recordings: list[list[int]] = [[300], [3000, 80], [90]]
    prompts = [[20], [31], [9]]
    together = make_audio(*recordings) | make_prompts(*prompts)
    with torch.no_grad():
        positions = (together["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = model(**together, position_ids=positions).logits
    answers = model.generate(**together, max_new_tokens=5, do_sample=False)[:, together["input_ids"].shape[1] :]
    first = 0
    for row, windows in enumerate(recordings):
        own = slice(first, first + len(windows))
        first += len(windows)
        real = together["attention_mask"][row].bool()
        alone = {
            "input_ids": together["input_ids"][row : row + 1, real],
            "input_features": together["input_features"][own],
            "feature_attention_mask": together["feature_attention_mask"][own],
            "windows_per_audio": torch.tensor([len(windows)]),
        }
        with torch.no_grad():
            torch.testing.assert_close(model(**alone).logits[0], logits[row, real], rtol=1e-3, atol=1e-3)
        assert torch.equal(model.generate(**alone, max_new_tokens=5, do_sample=False)[0, -5:], answers[row])


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize(
    "encoder",
    [
        {"num_mel_bins": 80, "d_model": 16},
        {"num_mel_bins": 128, "d_model": 16},
        {"num_mel_bins": MEL_BINS, "d_model": 40, "encoder_attention_heads": 5, "encoder_layers": 1},
    ],
    ids=["80 bins", "128 bins", "width 40"],
)
def test_a_full_window_has_the_logits_of_stock_qwen2_audio_with_the_same_parts(
    name: str, encoder: dict[str, Any], make_prompts: Make
) -> None:
    fields = tiny_config()
    fields |= {"text_config": SIZES | LANGUAGE_MODELS[name], "audio_config": fields["audio_config"] | encoder}
    torch.manual_seed(0)
    stock = Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(**fields)).eval()
    model = Model(FastLongSpeechConfig(**fields, ctc_vocab_size=12)).eval()
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected and all("ctc_decoder" in key for key in missing)
    inputs: dict[str, Tensor] = make_prompts([750]) | {
        "input_features": torch.randn(1, encoder["num_mel_bins"], 3000),
        "feature_attention_mask": torch.ones(1, 3000, dtype=torch.long),
    }
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, compression="none").logits, stock(**inputs).logits)
    fused = model.get_audio_features(inputs["input_features"], inputs["feature_attention_mask"], target_length=40)
    assert fused.pooler_output.shape == (40, 24) and fused.last_hidden_state.shape == (40, encoder["d_model"])
