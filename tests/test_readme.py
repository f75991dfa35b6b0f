"""The README's Python and its `fastlongspeech` commands run as they are written there, on the demo model."""

import re
import shlex
from pathlib import Path

import pytest
import soundfile
from conftest import RATE, speech
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from fastlongspeech import FastLongSpeechProcessor
from fastlongspeech.app import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QWEN2_AUDIO = "Qwen/Qwen2-Audio-7B-Instruct"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line.partition("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
# They install, download, train a model of 7B parameters, or call what other tests run.
NOT_RUN = ("make ", "source ", "pip ", "accelerate ", "fastlongspeech assemble ", "small=", "fastlongspeech page ")
SMALL_MODEL = '--model "$small"'  # fetched from the network


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which a reader has the repository's `checkpoints/` and `demo/`, and an interview."""
    for name in ("checkpoints", "demo"):
        (tmp_path / name).symlink_to(ROOT / name)
    soundfile.write(tmp_path / "interview.mp3", speech(65), RATE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def qwen2_audio(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock Qwen2-Audio of tiny size in a folder of its own, for the one whose weights are not here."""
    processor = FastLongSpeechProcessor.from_pretrained(checkpoint)
    fields = Qwen2AudioConfig.from_pretrained(checkpoint).to_dict()
    names = ("audio_config", "text_config", "audio_token_index")
    config = Qwen2AudioConfig(**{name: fields[name] for name in names})
    path = tmp_path_factory.mktemp("stock")
    Qwen2AudioForConditionalGeneration(config).save_pretrained(path)
    Qwen2AudioProcessor(processor.feature_extractor, processor.tokenizer).save_pretrained(path)
    return path


def test_the_python_runs_from_top_to_bottom(folder, qwen2_audio, capsys):
    snippets = blocks("python")
    printed, names = [], {}
    for snippet in snippets:
        exec(compile(snippet.replace(QWEN2_AUDIO, str(qwen2_audio)), "README.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    assert sum(QWEN2_AUDIO in snippet for snippet in snippets) == 1
    assert printed[0] == "on tuesday at ten\n"
    assert printed[1].splitlines()[0] == "on tuesday at ten"
    assert (folder / "patrick.safetensors").exists()


def test_every_command_is_run_or_known_not_to_be():
    unknown = [command for command in COMMANDS if not command.startswith(("fastlongspeech ", *NOT_RUN))]
    assert not unknown


def is_slow(command: str) -> bool:
    return command.startswith("fastlongspeech transcribe") and "--ctc" not in command


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow if is_slow(command) else ())
        for command in COMMANDS
        if command.startswith("fastlongspeech ") and not command.startswith(NOT_RUN) and SMALL_MODEL not in command
    ],
)
def test_a_command_answers(command, folder, capsys):
    assert cli.main(shlex.split(command)[1:]) == 0
    answer = capsys.readouterr().out.strip()
    assert answer
    if "Patrick" in command:
        answer, place = answer.splitlines()
        assert answer == "on tuesday at ten" and re.fullmatch(r"\[\d:\d\d\]", place)
