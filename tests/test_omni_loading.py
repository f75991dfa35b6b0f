"""Checkpoints of the Omnis: a thinker alone, and the thinker in a full model, by the names of any version."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_omni import AUDIO, OMNIS, Omni, make_audio, make_prompts

VOCODER = {"Qwen2_5Omni": "token2wav", "Qwen3OmniMoe": "code2wav"}


@pytest.fixture(params=OMNIS)
def omni(request: pytest.FixtureRequest) -> Omni:
    return OMNIS[request.param]


@pytest.fixture
def stock(omni: Omni) -> Any:
    return omni.make_stock()


@pytest.fixture
def model(omni: Omni, stock: Any) -> Any:
    return omni.make_model(stock)


def released_name(name: str) -> str:
    """Returns the name that a parameter of the thinker has in the released checkpoints."""
    for part in ("audio_tower", "visual"):
        name = name.replace(f"model.{part}.", f"{part}.")
    return name.replace("model.language_model.", "model.")


def save_full_model(omni: Omni, stock: Any, folder: Path, rename: Any) -> None:
    """Writes a full Omni: its thinker, and some parameters of a talker and a vocoder."""
    weights = {f"thinker.{rename(name)}": weight for name, weight in stock.state_dict().items()}
    weights |= {name: torch.zeros(2) for name in ("talker.model.norm.weight", f"{VOCODER[omni.stock]}.x.bias")}
    omni.stock_class("Config")(thinker_config=omni.fields()).save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["thinker", "thinker, released names", "full", "full, released names"])
@torch.no_grad()
def test_a_stock_checkpoint_loads_and_gives_the_logits_of_the_stock_model(
    omni: Omni, stock: Any, layout: str, tmp_path: Path
) -> None:
    if layout.startswith("full"):
        save_full_model(omni, stock, tmp_path, released_name if "released" in layout else str)
    else:
        stock.save_pretrained(tmp_path)
        rename = released_name if "released" in layout else str
        weights = {rename(name): weight for name, weight in stock.state_dict().items()}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = omni.our_class("ForConditionalGeneration").from_pretrained(tmp_path, output_loading_info=True)
    assert all(name.startswith("model.ctc_decoder.") for name in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.model_type.startswith("fastlongspeech_") and not model.config.ctc_trained
    inputs = make_audio(730) | make_prompts([omni.frames_of(730)])
    expected = stock(**inputs).logits
    torch.testing.assert_close(model(**inputs, compression="none").logits, expected, rtol=1e-4, atol=1e-4)


def test_the_configuration_of_a_full_model_may_be_given(omni: Omni, stock: Any, tmp_path: Path) -> None:
    save_full_model(omni, stock, tmp_path, released_name)
    config = omni.stock_class("Config").from_pretrained(tmp_path)
    model = omni.our_class("ForConditionalGeneration").from_pretrained(tmp_path, config=config)
    assert (model.config.audio_config.d_model, model.config.audio_token_id) == (16, AUDIO)


@torch.no_grad()
def test_saving_keeps_everything(omni: Omni, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and again.config.ctc_trained
    inputs = make_audio(730, 190) | make_prompts([20], [9])
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    module = type(model).__module__.rpartition(".")[2]
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"] == (
        f"{module}.{omni.ours}ForConditionalGeneration"
    )


def test_a_configuration_without_the_token_before_images_has_that_of_the_released_models(omni: Omni) -> None:
    fields = omni.fields()
    del fields["vision_start_token_id"]
    assert omni.our_class("Config")(**fields).vision_start_token_id == 151_652
