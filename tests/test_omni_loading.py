"""Checkpoints of the Omnis: a thinker alone, and the thinker in a full model, by the names of any version."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import TINY_HOSTS, TinyHost
from safetensors.torch import load_file, save_file
from tiny_omni import AUDIO, OMNIS, Omni, make_audio, make_prompts

from fastlongspeech.hub.convert import convert

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


def save_released(tiny: TinyHost, folder: Path, without: str = " ") -> None:
    """Writes a full Omni as it is released: every expert's weights apart, a talker beside the thinker."""
    stock = tiny.make_stock()
    stock.generation_config.eos_token_id = None
    stock.save_pretrained(folder)  # the thinker, under the released names
    weights = {f"thinker.{name}": weight for name, weight in load_file(folder / "model.safetensors").items()}
    weights = {name: weight for name, weight in weights.items() if without not in name}
    weights["talker.model.layers.0.mlp.experts.0.up_proj.weight"] = torch.zeros(2, 2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    thinker = json.loads((folder / "config.json").read_text())
    full = {"model_type": tiny.model_type.removesuffix("_thinker"), "thinker_config": thinker}
    (folder / "config.json").write_text(json.dumps(full))
    tiny.tokenizer().save_pretrained(folder)
    tiny.feature_extractor().save_pretrained(folder)


QWEN2_5_OMNI, QWEN3_OMNI = (tiny for tiny in TINY_HOSTS if tiny.model_type.endswith("thinker"))


@pytest.mark.parametrize("tiny", [QWEN3_OMNI, pytest.param(QWEN2_5_OMNI, marks=pytest.mark.slow)])
def test_convert_takes_the_thinker_of_a_full_model(tiny: TinyHost, tmp_path: Path) -> None:
    """And joins its experts, more than ten of them, in their order: the logits are those of the stock thinker."""
    save_released(tiny, tmp_path / "released")
    record = convert(tmp_path / "released", tmp_path / "ours", device="cpu")
    assert 0 <= record["differences"]["logits"] < 1e-4
    found, expected = load_file(tmp_path / "ours" / "model.safetensors"), tiny.make_stock().state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_convert_says_which_experts_are_not_whole(tmp_path: Path) -> None:
    for missing, message in (
        ("experts.7.up_proj", "21 parts of .*experts.gate_up_proj do not fit each other"),
        ("experts.7.", "experts.down_proj has the shape .10, 24, 16. in the source, .11, 24, 16. by its config.json"),
    ):
        save_released(QWEN3_OMNI, tmp_path / "released", without=missing)
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "released", tmp_path / "ours", device="cpu")
