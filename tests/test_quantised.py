"""Quantised loading: the content densities stay what they are in float32. Answers would not show that they do not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_rows
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import BitsAndBytesConfig, TorchAoConfig

from fastlongspeech import FastLongSpeechForConditionalGeneration
from fastlongspeech.hub import quantised

Model = FastLongSpeechForConditionalGeneration
Make = Callable[..., Any]

QUANTISED = {
    "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "bitsandbytes int8, own list": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]),
    "bitsandbytes nf4, own list": lambda: BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"]),
    "torchao int8, own list": lambda: TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head"]),
}


def assert_same_densities(found: Tensor, expected: Tensor) -> None:
    assert torch.corrcoef(torch.stack((found, expected)))[0, 1] > 0.99
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


@pytest.fixture
def float32(model: Model, tmp_path: Path) -> Model:
    """The tiny model; it is saved in `tmp_path` as well."""
    model.save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize("how", QUANTISED)
def test_densities_of_a_quantised_model(float32: Model, make_audio: Make, tmp_path: Path, how: str) -> None:
    audio = make_audio([900])
    frames = float32.encode(**audio).frames
    model = Model.from_pretrained(tmp_path, quantization_config=QUANTISED[how]()).eval()
    layer = model.model.language_model.layers[0].mlp.up_proj
    assert type(layer) is not torch.nn.Linear or type(layer.weight.data) is not Tensor  # it is quantised indeed
    assert_same_densities(model.density(frames), float32.density(frames))
    recordings = model.encode(**audio)
    assert model.compress(recordings, 20).pooler_output.shape == (20, 24)


@pytest.mark.parametrize("how", ["bitsandbytes int8", "torchao int8"])
def test_a_decoder_that_is_quantised_all_the_same(
    float32: Model, make_audio: Make, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "_keep_in_fp32_modules", [])
    frames = float32.encode(**make_audio([900])).frames
    model = Model.from_pretrained(tmp_path, quantization_config=QUANTISED[how]()).eval()
    assert type(model.model.ctc_decoder.projector.weight.data) is not Tensor or (
        type(model.model.ctc_decoder.projector) is not torch.nn.Linear
    )
    assert_same_densities(model.density(frames), float32.density(frames))


def test_a_model_that_is_quantised_after_loading(float32: Model, make_audio: Make, tmp_path: Path) -> None:
    frames = float32.encode(**make_audio([900])).frames
    model = Model.from_pretrained(tmp_path).eval()
    model.density(frames)  # the product of both matrices is there already
    quantize_(model, Int8WeightOnlyConfig())
    assert type(model.model.ctc_decoder.linear.weight.data) is not Tensor
    assert_same_densities(model.density(frames), float32.density(frames))
    assert len(model.encode(**make_audio([900])).frames) == len(frames)


def test_the_costs_are_measured_row_by_row_and_a_stopped_run_goes_on(
    checkpoint: Path, wav: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(quantised, "ROWS", [quantised.ROWS[0], quantised.ROWS[2]])
    clips = write_rows(tmp_path / "clips.jsonl", [{"audio": str(wav), "text": "the cat sat"}])
    asked = {"audio": str(wav), "question": "Who?", "answer": "I."}
    questions = write_rows(tmp_path / "questions.jsonl", [asked, asked])
    page = tmp_path / "page.md"
    page.write_text("# Costs\n")
    command = [str(checkpoint), "--clips", str(clips), "--questions", str(questions), "--page", str(page)]
    command += ["--target-length", "20", "--output", str(tmp_path / "figures")]
    quantised.main(command)
    journal = tmp_path / "figures" / "figures.jsonl"
    plain, int8 = (json.loads(line) for line in journal.read_text().splitlines())
    assert (plain["apart"], plain["alike"]) == (0, pytest.approx(1)) and int8["alike"] > 0.99
    model = Model.from_pretrained(checkpoint)
    assert plain["bytes"] == sum(weight.nbytes for weight in [*model.parameters(), *model.buffers()])
    assert int8["bytes"] < plain["bytes"]
    assert "| bitsandbytes int8, encoder whole |" in page.read_text() and "2 questions, 1 clips" in page.read_text()

    journal.write_text(journal.read_text().splitlines(keepends=True)[0])
    capsys.readouterr()
    quantised.main(command)
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[:1]] == [int8["name"]]
    with pytest.raises(ValueError, match="holds results with target_length 20, not 10; name another"):
        quantised.main([*command, "--target-length", "10"])
