"""The command prints answers on stdout, and what they cost on stderr."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fastlongspeech import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from fastlongspeech.app import cli, defaults
from fastlongspeech.app.places import Place
from fastlongspeech.app.session import Session

QUESTION = "Where does Anna live?"


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A stereo file of 31 s at 8 kHz and one of 2 s."""
    folder = tmp_path_factory.mktemp("recordings")
    noise = np.random.default_rng(0).normal(scale=0.1, size=(31 * 8000, 2))
    soundfile.write(folder / "long.flac", noise, 8000)
    soundfile.write(folder / "short.wav", noise[: 2 * 8000, 0], 8000)
    return [str(folder / "long.flac"), str(folder / "short.wav")]


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def python(checkpoint: Path, turns: list[str], length: int = 750) -> str:
    """The answer to QUESTION by the documented Python calls, 8 tokens long."""
    processor = FastLongSpeechProcessor.from_pretrained(checkpoint)
    model = FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint)
    parts = [{"type": "audio", "path": path} for path in turns] + [{"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        target_length=length,
    )
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True).strip()


def test_ask_prints_the_answer_and_what_it_cost(checkpoint, recordings, capsys):
    assert run("ask", *recordings, QUESTION, "--model", checkpoint, "--target-length", 20, "--max-new-tokens", 8) == 0
    out, err = capsys.readouterr()
    assert out.partition("\n[")[0].strip() == python(checkpoint, recordings, 20)
    assert f"{recordings[0]}: 31.0 s, 2 windows, 775 frames -> 20 tokens\n" in err
    assert f"{recordings[1]}: 2.0 s, 1 window, 50 frames -> 20 tokens\n" in err
    assert re.search(
        r"^loading [\d.]+ s, reading [\d.]+ s, listening [\d.]+ s, answering [\d.]+ s$", err, re.MULTILINE
    )


def test_ask_as_json(checkpoint, recordings, capsys):
    assert run("ask", recordings[0], QUESTION, "--model", checkpoint, "--json", "--max-new-tokens", 8) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer.pop("seconds").keys() == {"loading", "reading", "listening", "answering"}
    answer.pop("leans_on")
    assert answer.pop("ended") in (True, False)
    assert answer == {
        "answer": python(checkpoint, recordings[:1]),
        "question": QUESTION,
        "recordings": [{"path": recordings[0], "seconds": 31.0, "windows": 2, "frames": 775, "tokens": 750}],
    }


def test_ask_names_the_place_that_the_answer_leans_on(checkpoint, recordings, capsys, monkeypatch):
    place = Place(1, 751.2, 760.0)
    monkeypatch.setattr(Session, "find_place", lambda *_: place)
    command = ["ask", *recordings, QUESTION, "--model", checkpoint, "--max-new-tokens", 2]
    run(*command)
    assert capsys.readouterr().out.splitlines()[-1] == f"[{recordings[1]} 12:31]"
    run(*command, "--json")
    leans_on = json.loads(capsys.readouterr().out)["leans_on"]
    assert leans_on == {"path": recordings[1], "start": 751.2, "end": 760.0}
    monkeypatch.setattr(Session, "find_place", lambda *_: None)
    run(*command, "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["leans_on"] is None


def test_cost_needs_no_weights(checkpoint, recordings, capsys, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path)
    command = ["cost", *recordings, "--model", tmp_path, "--target-length", 20]
    assert run(*command) == 0
    out = capsys.readouterr().out
    assert f"{recordings[0]}: 31.0 s, 2 windows, 775 frames -> 20 tokens\n" in out
    assert f"{recordings[1]}: 2.0 s, 1 window, 50 frames -> 20 tokens\n" in out
    assert re.search(r"^    encoder +[\d.e-]+ TFLOPs +[\d.]+%$", out, re.MULTILINE)
    assert re.search(r"^    without fusion +[\d.e-]+ TFLOPs +[\d.]+%$", out, re.MULTILINE)

    assert run(*command, "--json", "--max-new-tokens", 8) == 0
    costs = json.loads(capsys.readouterr().out)
    first = costs["recordings"][0]
    assert costs["answer_tokens"] == 8
    assert (first["path"], first["seconds"], first["windows"], first["tokens"]) == (recordings[0], 31.0, 2, 20)
    assert first["total"] == sum(first["flops"].values()) < first["total_without_fusion"]


def test_cost_of_durations(checkpoint, capsys):
    assert run("cost", "--seconds", 3600, 0.5, "--model", checkpoint) == 0
    out = capsys.readouterr().out
    assert "3600 s: 3600.0 s, 120 windows, 90000 frames -> 750 tokens\n" in out
    assert "0.5 s: 0.5 s, 1 window, 12 frames -> 12 tokens\n" in out
    with pytest.raises(SystemExit):
        run("cost", "--model", checkpoint)
    assert "give either recordings or --seconds" in capsys.readouterr().err
    assert run("cost", "--seconds", "-1", "--model", checkpoint) == 1
    assert "at least one 40 ms frame, got -1" in capsys.readouterr().err


def test_cost_and_ask_take_the_configuration_s_target_length(checkpoint, recordings, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"target_length": 100}))
    options = ["--model", folder, "--json", "--max-new-tokens", 1]
    tokens = []
    for command in (["cost", recordings[0]], ["ask", recordings[0], QUESTION]):
        assert run(*command, *options) == 0
        tokens.append(json.loads(capsys.readouterr().out)["recordings"][0]["tokens"])
    assert tokens == [100, 100]


def test_an_answer_that_was_stopped_is_said_to_be(checkpoint, recordings, capsys):
    run("ask", recordings[1], QUESTION, "--model", checkpoint, "--max-new-tokens", 1)
    assert "the answer may go on: it reached --max-new-tokens 1\n" in capsys.readouterr().err
    run("ask", recordings[1], QUESTION, "--model", checkpoint, "--max-new-tokens", 1, "--json")
    assert json.loads(capsys.readouterr().out)["ended"] is False


def test_an_empty_question_is_refused(checkpoint, recordings, capsys):
    with pytest.raises(SystemExit):
        run("ask", recordings[1], " ", "--model", checkpoint)
    assert "QUESTION is empty; write one." in capsys.readouterr().err


def test_a_model_without_an_end_token_answers_to_the_limit(checkpoint, recordings, capsys, monkeypatch):
    load = FastLongSpeechForConditionalGeneration.from_pretrained

    def endless(*args, **kwargs):
        model = load(*args, **kwargs)
        model.generation_config.eos_token_id = None
        return model

    monkeypatch.setattr(FastLongSpeechForConditionalGeneration, "from_pretrained", endless)
    assert run("ask", recordings[1], QUESTION, "--model", checkpoint, "--max-new-tokens", 2) == 0
    assert "it reached --max-new-tokens 2\n" in capsys.readouterr().err


def test_without_a_model_the_command_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(defaults, "DEMO_MODEL", tmp_path)
    assert run("ask", "a.wav", QUESTION) == 1
    message = capsys.readouterr().err
    assert f"no demo model in {tmp_path}" in message and "an installed package carries no weights" in message
    assert "pass --model" in message
    assert run("ask", "a.wav", QUESTION, "--model", tmp_path / "none") == 1
    assert "none is no folder" in capsys.readouterr().err


def test_errors_are_one_sentence(checkpoint, capsys):
    assert run("ask", "missing.wav", QUESTION, "--model", checkpoint) == 1
    assert capsys.readouterr() == ("", "fastlongspeech: audio file not found: missing.wav\n")
    assert run("ask", "missing.wav", QUESTION, "--model", checkpoint, "--device", "abacus") == 1
    assert "fastlongspeech: --device abacus cannot be used here" in capsys.readouterr().err


LIGHT = """
import contextlib, io, json, sys
from fastlongspeech.app import cli

for command in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = cli.main(command)
        except SystemExit as end:
            status = end.code
    heavy = {"torch", "transformers"} & sys.modules.keys()
    print(json.dumps([status, sorted(heavy), out.getvalue()]))
"""


def test_what_needs_no_model_does_not_load_torch(checkpoint, recordings):
    model = ["--model", str(checkpoint)]
    commands: list[tuple[int, list[str], str]] = [
        (0, ["--help"], "ask | transcribe | cost | "),
        (0, ["ask", "--help"], "--max-new-tokens"),
        (2, ["ask", "a.wav"], "the following arguments are required: QUESTION"),
        (2, ["ask", "a.wav", QUESTION, "--dtype", "int3"], "invalid choice"),
        (2, ["ask", "a.wav", QUESTION, "--target-length", "0"], "it must be a positive integer, got 0"),
        (2, ["translate"], "invalid choice"),
        (0, ["cost", *recordings, *model], "31.0 s, 2 windows, 775 frames -> 750 tokens"),
        (0, ["cost", "--seconds", "3600", "--model", defaults.QWEN2_AUDIO], "120 windows, 90000 frames"),
        (1, ["cost", "missing.wav", "--model", "/nowhere"], "/nowhere is no folder"),
    ]
    done = start(["-c", LIGHT, json.dumps([command for _, command, _ in commands])], stdout=subprocess.PIPE)
    lines = done.communicate(timeout=120)[0].splitlines()
    for (expected, command, text), line in zip(commands, lines, strict=True):
        status, heavy, printed = json.loads(line)
        assert (status, heavy) == (expected, []), command
        assert text in printed


PACKAGE = """
import sys, fastlongspeech
assert "load_recording" in dir(fastlongspeech) and "FastLongSpeechModel" in dir(fastlongspeech)
try:
    fastlongspeech.nothing
except AttributeError as error:
    assert str(error) == "module 'fastlongspeech' has no attribute 'nothing'"
else:
    raise AssertionError
assert not {"torch", "transformers"} & sys.modules.keys()
from fastlongspeech import *
from transformers import AutoConfig, AutoProcessor
assert FastLongSpeechProcessor is fastlongspeech.FastLongSpeechProcessor
assert type(AutoConfig.from_pretrained(sys.argv[1])) is FastLongSpeechConfig
assert type(AutoProcessor.from_pretrained(sys.argv[1])) is FastLongSpeechProcessor
"""


def test_the_package_loads_its_classes_when_one_is_taken(checkpoint):
    process = start(["-c", PACKAGE, str(checkpoint)])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def start(arguments: list[str], path: list[str] = sys.path, stdout: int = subprocess.DEVNULL) -> subprocess.Popen:
    """A Python of its own, whose stderr can be read."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in background
    )


def test_ctrl_c_while_torch_loads_leaves_quietly(checkpoint, recordings, tmp_path):
    """A torch that is interrupted as it begins to load."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    process = start(["-m", "fastlongspeech", "ask", recordings[0], QUESTION], path=[str(tmp_path), *sys.path])
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


def test_ctrl_c_leaves_quietly(checkpoint, recordings):
    command = ["-m", "fastlongspeech", "ask", recordings[0], QUESTION, "--model", str(checkpoint)]
    process = start([*command, "--max-new-tokens", "100000"])
    assert process.stderr is not None
    try:
        # Libraries may have something to say before; where the process ends, there are no more lines.
        assert any(line.endswith("775 frames -> 750 tokens\n") for line in process.stderr)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "")
