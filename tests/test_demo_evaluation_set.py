"""The demo-scale evaluation set: the shape of LongSpeech-Eval, and nothing that training speaks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastlongspeech.data.tasks import load_questions
from fastlongspeech.demo import evaluation_set
from fastlongspeech.demo.sentences import is_held_out
from fastlongspeech.evaluation import longspeech_eval

needs_voices = pytest.mark.skipif(
    not (shutil.which("espeak-ng") and shutil.which("flite")), reason="espeak-ng and flite are not installed"
)


def test_the_long_recordings_have_the_published_shape():
    seconds = evaluation_set.durations()
    assert len(seconds) == 164
    assert max(seconds) == pytest.approx(1000)
    assert np.mean(seconds) == pytest.approx(132.77, abs=2)
    assert min(seconds) > 30
    assert seconds == evaluation_set.durations()


@needs_voices
def test_a_long_recording_lasts_as_planned_and_asks_of_what_is_said():
    index = int(np.argmin(evaluation_set.durations()))
    samples, row = evaluation_set.draw("long", index)
    assert 0 <= evaluation_set.durations()[index] - len(samples) / 16000 < 6  # less than a sentence and a pause
    assert all(is_held_out(sentence["text"]) for sentence in row["sentences"])
    facts = [question for question in row["questions"] if question["kind"] != "voice"]
    assert 3 <= len(facts) <= 5 and all(fact["answer"] in row["text"] for fact in facts)
    again, row_again = evaluation_set.draw("long", index)
    np.testing.assert_array_equal(samples, again)
    assert row == row_again


@needs_voices
def test_the_manifests_are_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluation_set, "durations", lambda: [31.0] * 164)
    monkeypatch.setattr("sys.argv", ["evaluation_set", str(tmp_path), "--recordings", "1", "--workers", "1"])
    evaluation_set.main()
    assert len(load_questions("qa", tmp_path / "long/qa.jsonl").examples) >= 3
    assert load_questions("asr", tmp_path / "short/asr.jsonl").metric == "transcript"
    for part in ("long", "short"):
        facts = load_questions("qa", tmp_path / part / "qa.jsonl").examples
        assert all(fact.notes["kind"] != "voice" and 0 <= fact.notes["time"] < fact.duration for fact in facts)
        (voice,) = load_questions("choice", tmp_path / part / "voice.jsonl").examples
        assert voice.choices == ["man", "woman"] and "time" not in voice.notes

    recording = tmp_path / "short/00000.flac"
    made = recording.stat().st_mtime_ns, json.loads((tmp_path / "short/recordings.jsonl").read_text())
    evaluation_set.main()  # what is there is kept
    assert made == (recording.stat().st_mtime_ns, json.loads((tmp_path / "short/recordings.jsonl").read_text()))


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng is not installed")
def test_espeak_ng_speaks_a_document(tmp_path: Path):
    seconds = longspeech_eval.synthesize("Hello world, it is me.", longspeech_eval.SPEAK, tmp_path / "a" / "b.flac")
    assert 1 < seconds < 4
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.flac"]
