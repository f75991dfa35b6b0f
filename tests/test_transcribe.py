"""The command `transcribe`: formats, times, what it covers, and a run that goes on after it was killed."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import av
import pytest
import soundfile
from conftest import RATE, speech

from fastlongspeech import load_recording
from fastlongspeech.app import cli, transcribe
from fastlongspeech.app.session import Session
from fastlongspeech.app.transcript import Window, read_windows
from fastlongspeech.app.transcript import transcribe as written

DEMO = Path(__file__).parents[1] / "checkpoints" / "fastlongspeech-demo"
RECORDING = Path(__file__).parents[1] / "demo" / "recording.flac"


def run(*arguments: object) -> int:
    return cli.main(["transcribe", *map(str, arguments)])


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """31 s, at 8 kHz."""
    path = tmp_path / "long.flac"
    soundfile.write(path, speech(31.0, rate=8000), 8000)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 40 s of the demo's recording."""
    path = tmp_path_factory.mktemp("clip") / "clip.wav"
    soundfile.write(path, load_recording(RECORDING)[: 40 * RATE], RATE)
    return path


@pytest.fixture(scope="module")
def found(clip) -> list:
    """What the demo model's CTC decoder writes of the clip, from Python."""
    session = Session(DEMO)
    return list(written(session, read_windows(session, session.read(clip)), by_ctc=True))


def test_text_comes_window_by_window_and_the_coverage_on_stderr(clip, found, capsys):
    assert run(clip, "--ctc", "--model", DEMO) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [window.text for window in found] and len(found) == 2
    assert f"{clip}: read 40.0 of 40.0 s; answered 40.0 s; windows by way: ctc 2\n" in err


def test_json_has_segments_or_words_and_the_coverage(clip, found, capsys):
    assert run(clip, "--ctc", "--model", DEMO, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"] == " ".join(window.text for window in found)
    assert " ".join(segment["text"] for segment in result["segments"]) == result["text"]
    assert result["coverage"]["read"] == 40.0 and result["path"] == str(clip)
    assert result["seconds"].keys() == {"loading", "reading", "listening"}
    assert run(clip, "--ctc", "--model", DEMO, "--format", "json", "--times", "words") == 0
    words = json.loads(capsys.readouterr().out)["words"]
    times = [(word.text, round(word.start, 3), round(word.end, 3)) for window in found for word in window.words]
    assert [(word["text"], word["start"], word["end"]) for word in words] == times


@pytest.mark.parametrize("form", ["srt", "vtt"])
def test_subtitles_are_read_by_ffmpeg(form, clip, found, tmp_path):
    output = tmp_path / f"clip.{form}"
    assert run(clip, "--ctc", "--model", DEMO, "--output", output) == 0
    with av.open(str(output)) as file:
        packets = [packet for packet in file.demux(file.streams.subtitles[0]) if packet.size]
    texts = [bytes(packet).decode().replace("\n", " ") for packet in packets]
    assert " ".join(texts) == " ".join(window.text for window in found)
    first, last = packets[0], packets[-1]
    assert float(first.pts * first.time_base) == pytest.approx(found[0].words[0].start, abs=0.001)
    said = max(found[-1].words[-1].end, float(last.pts * last.time_base) + 0.8)
    assert float((last.pts + last.duration) * last.time_base) == pytest.approx(said, abs=0.001)
    assert sorted(path.name for path in tmp_path.iterdir()) == [output.name]


def test_the_language_model_is_checked_by_what_ctc_hears(checkpoint, recording, capsys):
    """A model of random weights writes nonsense, which its CTC decoder (random, too) does not hear."""
    command = [recording, "--model", checkpoint, "--max-new-tokens", 8, "--target-length", 20, "--json"]
    assert run(*command) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["coverage"]["windows"]) == {"ctc"} and result["text"]
    assert result["coverage"]["read"] == pytest.approx(31.0, abs=0.05)


KILLED = """
import os, signal, sys
from fastlongspeech.app import cli, transcribe

def append(self, row, write=transcribe.Journal.append):
    write(self, row)
    if "text" in row:
        self.file.write(b'{"start": 3')  # the next line is cut short
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

transcribe.Journal.append = append
cli.main(sys.argv[1:])
"""


def test_a_run_that_was_killed_goes_on_with_the_next_window(clip, found, tmp_path, capsys, monkeypatch):
    output = tmp_path / "clip.txt"
    command = ["transcribe", str(clip), "--ctc", "--model", str(DEMO), "--output", str(output)]
    path = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], env=path, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists() and (tmp_path / "clip.txt.unfinished").exists()

    asked = []
    monkeypatch.setattr("fastlongspeech.app.transcript.read_windows", spy := spied(asked))
    assert spy is not None and run(*command[1:]) == 0
    assert asked == [found[0].end]
    assert output.read_text(encoding="utf-8").splitlines() == [window.text for window in found]
    assert f"goes on at {found[0].end:.1f} s, from {output}.unfinished" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.txt"]


def spied(asked: list):
    def windows(session, samples, start=0.0):
        asked.append(start)
        return read_windows(session, samples, start)

    return windows


def test_what_another_run_has_begun_is_not_gone_on_with(clip, recording, checkpoint, tmp_path, capsys):
    output = tmp_path / "out.txt"
    unfinished = tmp_path / "out.txt.unfinished"
    unfinished.write_text('{"format": "fastlongspeech transcript 1", "recording": "another"}\n', encoding="utf-8")
    assert run(recording, "--ctc", "--model", checkpoint, "--output", output) == 1
    assert f"{unfinished} was begun for another recording, model or option" in capsys.readouterr().err
    assert not output.exists()


def test_a_recording_that_cannot_be_read_is_refused_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transcribe, "open_session", None)
    (tmp_path / "notes.wav").write_text("no audio")
    for name, message in (("notes.wav", "audio cannot be read"), ("none.wav", "audio file not found")):
        assert run(tmp_path / name) == 1
        assert f"fastlongspeech: {message}" in capsys.readouterr().err


HEADER = '{"format": "fastlongspeech transcript 1"}'


@pytest.mark.parametrize(
    "content, message",
    [
        ("notes of mine", "{} is no unfinished transcript; rename or remove it"),
        ('{"format": "fastlongspeech tran', "{} is no unfinished transcript; rename or remove it"),
        ("\n\n", "{} is no unfinished transcript; rename or remove it"),
        ('{"row": 1}\n', "{} is no unfinished transcript; rename or remove it"),
        ("notes\nof mine\n", "line 1 of {} is no JSON object; rename or remove the file"),
        (f"{HEADER}\n" + '{"start": 1}\n', "{} is damaged: line 2 is no window that begins where the last one ended"),
    ],
)
def test_a_file_that_is_no_unfinished_transcript_is_left_as_it_is(content, message, tmp_path):
    path = tmp_path / "out.txt.unfinished"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(path))}.* or name another --output.$"):
        with transcribe.keep_windows(tmp_path / "out.txt", json.loads(HEADER)):
            raise AssertionError("it goes on")
    assert path.read_text(encoding="utf-8") == content


def test_kept_windows_follow_one_another(found, tmp_path):
    output, started_as = tmp_path / "out.txt", json.loads(HEADER)
    with transcribe.keep_windows(output, started_as) as (journal, done):
        assert done == []
        journal.append(asdict(found[0]))
    with transcribe.keep_windows(output, started_as) as (journal, done):
        assert done == found[:1]
        journal.append(asdict(found[1]))
    with transcribe.keep_windows(output, started_as) as (journal, done):
        assert done == found
        journal.append(asdict(found[0]))  # as a second run would
    with pytest.raises(ValueError, match=r"out\.txt\.unfinished is damaged: line 4 is no window that begins"):
        with transcribe.keep_windows(output, started_as):
            raise AssertionError("it goes on")


@pytest.mark.skipif(transcribe.fcntl is None, reason="no locks on this system")
def test_two_runs_do_not_write_one_file(recording, checkpoint, tmp_path, capsys):
    output = tmp_path / "folder" / "out.txt"
    with transcribe.keep_windows(output, json.loads(HEADER)):
        assert run(recording, "--ctc", "--model", checkpoint, "--output", output) == 1
    message = f"fastlongspeech: another run writes {output}.unfinished; wait for its end, or name another --output.\n"
    assert capsys.readouterr().err == message
    assert transcribe.journal_of(output).read_text(encoding="utf-8") == f"{HEADER}\n"


def test_a_file_that_appears_meanwhile_is_not_overwritten(recording, checkpoint, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out.txt"

    def render(*arguments, really=transcribe.render):
        if not output.exists():
            output.write_text("another's", encoding="utf-8")
        return really(*arguments)

    monkeypatch.setattr(transcribe, "render", render)
    command = [recording, "--ctc", "--model", checkpoint, "--output", output]
    assert run(*command) == 1
    assert f"--output {output} appeared meanwhile; rename it and run the same" in capsys.readouterr().err
    assert output.read_text(encoding="utf-8") == "another's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.flac", "out.txt", "out.txt.unfinished"]
    output.unlink()
    monkeypatch.undo()
    monkeypatch.setattr("fastlongspeech.app.transcript.write_window", None)  # all windows are there
    assert run(*command) == 0 and output.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.flac", "out.txt"]


@pytest.mark.parametrize("change", ["dtype", "compression"])
def test_a_run_is_described_by_all_that_its_text_depends_on(checkpoint, change):
    arguments = argparse.Namespace(ctc=False, target_length=None)
    session = Session(checkpoint)
    before = transcribe.describe_run(session, speech(1.0), arguments)
    if change == "dtype":
        session.model.bfloat16()
    else:
        session.model.config.compression = "none"
    after = transcribe.describe_run(session, speech(1.0), arguments)
    assert [name for name in before if before[name] != after[name]] == [change]


def test_no_file_is_overwritten(recording, checkpoint, capsys):
    assert run(recording, "--ctc", "--model", checkpoint, "--output", recording) == 1
    assert f"--output {recording} exists already" in capsys.readouterr().err


def test_without_a_trained_ctc_decoder_words_share_the_time_of_their_window(
    checkpoint, recording, capsys, monkeypatch
):
    session = Session(checkpoint, max_new_tokens=8)
    session.model.config.ctc_trained = False
    monkeypatch.setattr(transcribe, "open_session", lambda *_, **__: session)
    assert run(recording, "--format", "vtt") == 0
    out, err = capsys.readouterr()
    assert "\n00:00:00.000 --> " in out and "\n00:00:30.000 --> " in out and " --> 00:00:31.000\n" in out
    assert "unfinished 2" in err
    for options in (["--ctc"], ["--format", "json", "--times", "words"]):
        assert run(recording, *options) == 1
        assert "this model has no trained CTC decoder" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["Hello.", "word " * 20, "A sentence of six words ends. " * 9, "word " * 500])
def test_a_window_without_words_is_split_into_segments_that_can_be_read(text):
    windows = [Window(0.0, 30.0, text.strip(), (), "language model"), Window(30.0, 30.5, "Bye", (), "language model")]
    result = json.loads(transcribe.render(windows, "json", "segments", {}))
    cues = [(cue["start"], cue["end"], cue["text"]) for cue in result["segments"]]
    assert " ".join(cue for _, _, cue in cues) == result["text"] == f"{text.strip()} Bye"
    assert all(0 < end - start <= 7.001 and len(said) <= 84 for start, end, said in cues)
    assert cues[0][0] == 0.0 and cues[-1] == (30.0, 30.5, "Bye")
    assert all(earlier[1] <= later[0] for earlier, later in zip(cues, cues[1:], strict=False))


@pytest.mark.parametrize(
    "options, form",
    [
        ([], "txt"),
        (["--output", "a.txt"], "txt"),
        (["--output", "a.VTT", "--times", "words"], "vtt"),
        (["--output", "a.json", "--json"], "json"),
        (["--output", "a.srt", "--format", "srt"], "srt"),
        (["--output", "a.notes"], "txt"),
        (["--output", "a.notes", "--format", "srt"], "srt"),
        (["--output", "srt"], "txt"),
    ],
)
def test_the_format_is_that_of_the_ending_where_none_is_given(options, form):
    assert cli.parse_arguments(["transcribe", "a.wav", *options]).format == form


@pytest.mark.parametrize(
    "options, message",
    [
        (["--output", "a.srt", "--format", "vtt"], "--output a.srt and the format vtt differ; change one of them"),
        (["--output", "a.txt", "--json"], "--output a.txt and the format json differ; change one of them"),
        (["--ctc", "--target-length", 5], "--ctc reads every frame"),
        (["--json", "--format", "srt"], "--json and --format srt exclude each other"),
        (["--times", "words"], "--times has no meaning in plain text"),
        (["--format", "doc"], "invalid choice: 'doc'"),
    ],
)
def test_options_without_meaning_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        run("a.wav", *options)
    assert message in capsys.readouterr().err
