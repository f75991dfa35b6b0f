"""What a manifest may say: parts of recordings, conversations; and that headers are read once."""

import json
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from conftest import CLIP_SECONDS, RATE, speech, write_rows

from fastlongspeech.audio_fastlongspeech import load_recording
from fastlongspeech.data import headers
from fastlongspeech.data.audio import load_samples
from fastlongspeech.data.manifests import load_rows, recordings_of
from fastlongspeech.data.tasks import load_questions

ASR, QA = ("audio", "text"), ("audio", "question", "answer")


# Parts


@pytest.fixture
def talk(tmp_path: Path) -> np.ndarray:
    """Three seconds, written as talk.wav, talk.flac and talk.ogg."""
    samples = speech(3.0)
    for ending in ("wav", "flac", "ogg"):
        soundfile.write(tmp_path / f"talk.{ending}", samples, RATE)
    return samples


@pytest.mark.parametrize("ending, exact", [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.05)])
def test_a_row_may_name_a_part_of_its_recording(talk, tmp_path, ending, exact):
    part = {"audio": f"talk.{ending}", "text": "a", "start": 0.5, "end": 1.75, "duration": 3.0}
    until_the_end = {"audio": f"talk.{ending}", "text": "b", "start": 2}
    rows = load_rows(write_rows(tmp_path / "parts.jsonl", [part, until_the_end]), ASR)
    assert rows.durations == pytest.approx([1.25, 1.0], abs=0.02)
    assert rows[0] == {"audio": str(tmp_path / f"talk.{ending}"), "text": "a", "start": 0.5, "end": 1.75}
    np.testing.assert_allclose(load_samples(rows[0]), talk[8000:28000], atol=exact)
    np.testing.assert_allclose(load_samples(rows[1])[:15000], talk[32000:47000], atol=exact)


def test_a_part_of_a_file_of_another_rate_lasts_as_long(tmp_path):
    soundfile.write(tmp_path / "high.wav", speech(2.0, rate=44100), 44100)
    samples = load_samples({"audio": str(tmp_path / "high.wav"), "start": 0.5, "end": 1.5})
    assert len(samples) == RATE
    inner = slice(1000, -1000)  # the resampler knows nothing beyond a part's ends
    np.testing.assert_allclose(samples[inner], speech(2.0)[8000:24000][inner], atol=0.1)


def test_a_part_that_is_no_longer_there_is_refused(talk, tmp_path):
    soundfile.write(tmp_path / "talk.wav", talk[:RATE], RATE)
    for ending in ("wav", "ogg"):
        with pytest.raises(ValueError, match="end is 9 s, but the recording lasts [13]"):
            load_samples({"audio": str(tmp_path / f"talk.{ending}"), "start": 0.5, "end": 9})


def test_a_part_that_its_recording_does_not_have_is_a_bad_row(talk, tmp_path):
    faults = {
        "has 'start' = '1'; it must be seconds": {"start": "1"},
        "has 'end' = 3.5, but its recording lasts 3.000 s; correct it": {"start": 0.5, "end": 3.5},
        "has a recording of 0.010 s; it must last at least 0.04 s": {"start": 2.99},
        "has 'duration' = 4.5, but its recording lasts 3.000 s; has it been changed or cut?": {"duration": 4.5},
    }
    rows = [{"audio": "talk.wav", "text": "a"} | place for place in faults.values()]
    with pytest.raises(ValueError, match="has 4 bad rows") as refusal:
        load_rows(write_rows(tmp_path / "bad.jsonl", rows), ASR)
    assert [line.partition(" has ")[2].rstrip(".") for line in str(refusal.value).splitlines()[1:]] == [
        fault.removeprefix("has ") for fault in faults
    ]


def test_evaluation_asks_about_the_part_too(talk, tmp_path):
    rows = [{"audio": "talk.wav", "question": "Who?", "answer": "Anna", "start": start} for start in (0.5, 1)]
    questions = load_questions("qa", write_rows(tmp_path / "qa.jsonl", rows))
    assert [example.duration for example in questions.examples] == [2.5, 2.0]
    assert len({example.recording for example in questions.examples}) == 2
    heard = load_recording(questions.audio(questions.examples[1]))
    np.testing.assert_allclose(heard, talk[RATE:], atol=1e-4)


# Conversations


def test_every_answer_of_a_conversation_is_a_row_with_the_turns_before_it(data, tmp_path):
    def part(number: int) -> dict[str, str]:
        return {"type": "audio", "audio": str(data / "clips" / f"{number}.wav")}

    def user(*parts: object) -> dict[str, object]:
        return {"role": "user", "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]}

    messages = [
        {"role": "system", "content": "You listen."},
        user(part(1), "Who?"),
        {"role": "assistant", "content": "Anna."},
        user(part(2) | {"start": 0.25, "end": 1.25}, part(3), "And here?"),
        {"role": "assistant", "content": [{"type": "text", "text": "Ben."}]},
    ]
    rows = load_rows(write_rows(tmp_path / "chats.jsonl", [{"messages": messages}]), QA)
    assert [rows[0], rows[1]] == [
        {"messages": messages[:2], "answer": "Anna."},
        {"messages": messages[:4], "answer": "Ben."},
    ]
    assert rows.places == ["line 1", "line 1, answer 2"]
    assert rows.durations == pytest.approx([CLIP_SECONDS[1], CLIP_SECONDS[1] + 1.0 + CLIP_SECONDS[3]])
    assert [recording.get("start") for recording in recordings_of(rows[1])] == [None, 0.25, None]


def test_a_conversation_that_teaches_nothing_or_names_no_recording_is_a_bad_row(data, tmp_path):
    audio = {"type": "audio", "audio": str(data / "clips" / "1.wav")}
    asked = {"role": "user", "content": [audio, {"type": "text", "text": "Who?"}]}
    answer = {"role": "assistant", "content": "Anna."}
    faults = {
        "do not end with the assistant's": {"messages": [asked]},
        "no recording before its first answer": {"messages": [{"role": "user", "content": "Who?"}, answer]},
        "the role 'robot'": {"messages": [asked, answer | {"role": "robot"}]},
        "a part of the assistant that is no text": {"messages": [asked, answer | {"content": [audio]}]},
        "messages and question": {"messages": [asked, answer], "question": "Who?"},
        "an audio part without audio": {"messages": [asked | {"content": [{"type": "audio"}]}, answer]},
        "a part of the user that is no text, or empty": {"messages": [asked | {"content": ""}, answer]},
        "does not exist": {"messages": [asked | {"content": [audio | {"audio": "nowhere.wav"}]}, answer]},
    }
    with pytest.raises(ValueError, match=f"has {len(faults)} bad rows") as refusal:
        load_rows(write_rows(tmp_path / "bad.jsonl", list(faults.values())), QA)
    for line, fault in zip(str(refusal.value).splitlines()[1:], faults, strict=True):
        assert fault in line


# Headers


@pytest.fixture
def headers_read(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was asked for its header, in any order."""
    asked: list[object] = []
    read: Callable = headers.recording_seconds

    def reader(source, name):
        asked.append(source if isinstance(source, str) else len(source))
        return read(source, name)

    monkeypatch.setattr(headers, "recording_seconds", reader)
    return asked


def test_a_header_is_read_once_and_again_when_its_file_has_changed(talk, tmp_path, headers_read):
    rows = [{"audio": f"talk.{ending}", "text": text} for ending in ("wav", "flac") for text in "ab"]
    manifest = write_rows(tmp_path / "rows.jsonl", rows)
    assert load_rows(manifest, ASR).durations == [3.0] * 4
    assert sorted(map(str, headers_read)) == [str(tmp_path / "talk.flac"), str(tmp_path / "talk.wav")]
    headers_read.clear()
    assert load_rows(manifest, ASR).durations == [3.0] * 4
    assert headers_read == []
    soundfile.write(tmp_path / "talk.wav", talk[:RATE], RATE)
    assert load_rows(manifest, ASR).durations == [1.0, 1.0, 3.0, 3.0]
    assert headers_read == [str(tmp_path / "talk.wav")]


def test_what_could_not_be_read_is_asked_again_and_a_damaged_memory_is_made_anew(talk, tmp_path, headers_read, home):
    whole = (tmp_path / "talk.wav").read_bytes()
    (tmp_path / "talk.wav").write_bytes(whole[:-100])
    manifest = write_rows(tmp_path / "mended.jsonl", [{"audio": "talk.wav", "text": "a"}])
    times = os.stat(tmp_path / "talk.wav").st_mtime_ns
    with pytest.raises(ValueError, match="cut off"):
        load_rows(manifest, ASR)
    (tmp_path / "talk.wav").write_bytes(whole)
    os.utime(tmp_path / "talk.wav", ns=(times, times))
    assert load_rows(manifest, ASR).durations == [3.0]
    (memory,) = (home / "fastlongspeech" / "headers").glob("mended-*.parquet")
    memory.write_bytes(b"PAR1")
    assert load_rows(manifest, ASR).durations == [3.0]
    assert len(headers_read) == 3


@pytest.mark.parametrize("outside", [True, False])
def test_the_headers_of_a_datasets_folder_are_remembered_too(data, tmp_path, headers_read, outside):
    audio = [str(data / "clips" / f"{number}.wav") for number in range(1, 4)]
    column = audio if outside else [{"bytes": Path(path).read_bytes(), "path": None} for path in audio]
    rows = datasets.Dataset.from_dict({"audio": column, "text": ["a", "b", "c"]})
    rows.cast_column("audio", datasets.Audio(decode=False)).save_to_disk(tmp_path / "saved")
    first = load_rows(tmp_path / "saved", ASR).durations
    assert first == pytest.approx(CLIP_SECONDS[1:4]) and len(headers_read) == 3
    assert load_rows(tmp_path / "saved", ASR).durations == first and len(headers_read) == 3


def test_a_flac_that_was_written_to_a_pipe_is_measured(tmp_path):
    flac = BytesIO()
    soundfile.write(flac, np.zeros(RATE), RATE, format="FLAC")
    content = bytearray(flac.getvalue())
    content[21] &= 0xF0  # the samples of the whole in 36 bits of the header; 0: not known
    content[22:26] = bytes(4)
    (tmp_path / "piped.flac").write_bytes(content)
    rows = [json.dumps({"audio": "piped.flac", "text": "a"})]
    assert load_rows(write_rows(tmp_path / "piped.jsonl", rows), ASR).durations == [1.0]
