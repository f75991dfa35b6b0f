"""The examples run as they say, here on a tiny random model."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastlongspeech import FastLongSpeechForConditionalGeneration
from fastlongspeech.compression_fastlongspeech import COMPRESSIONS

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_it_is_run(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert f"    python examples/{path.name} " in text.split('"""')[1]


def test_ask_answers_every_question_about_a_recording(checkpoint, data, capsys):
    clip = str(data / "clips" / "0.wav")  # 31 s: two windows, 775 frames
    example("ask").main([clip, "Who?", "When?", "--model", str(checkpoint), "--target-length", "9"])
    first, *answers = capsys.readouterr().out.splitlines()
    assert first == "31.0 s are 775 frames, fused to 9"
    assert [answer.partition("?")[0] for answer in answers if "?" in answer[:5]] == ["Who", "When"]


def test_fine_tune_leaves_a_model(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    output = tmp_path / "tuned"
    example("fine_tune").main([str(data / "qa.jsonl"), str(output), "--model", str(checkpoint), "--epochs", "1"])
    assert FastLongSpeechForConditionalGeneration.from_pretrained(output).config.ctc_trained


def test_compare_compressions_names_all_of_them(checkpoint, data, capsys):
    clip = str(data / "clips" / "1.wav")
    options = ["--model", str(checkpoint), "--target-lengths", "9", "4"]
    example("compare_compressions").main([clip, "Who?", *options])
    found = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if " frames: " in line]
    assert found == [[name, length] for name in COMPRESSIONS for length in ("9", "4")] + [["none", "25"]]
