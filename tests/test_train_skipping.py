"""A sample that goes bad while a run trains is skipped, counted and listed; too many of them end the run."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import soundfile
from conftest import RATE, speech, write_rows
from test_train import arguments, trained

from fastlongspeech.data.manifests import load_rows
from fastlongspeech.train import ctc, dct, skipping
from fastlongspeech.train.skipping import ReportBadSamples, SteadyRows

ASR = ("audio", "text")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for number in range(4):
        soundfile.write(tmp_path / f"{number}.wav", speech(1.0 + number, seed=number), RATE)
    rows = [{"audio": f"{number}.wav", "text": f"clip {number}"} for number in range(4)]
    write_rows(tmp_path / "rows.jsonl", rows)
    return tmp_path


def steady(clips: Path) -> SteadyRows:
    return SteadyRows(load_rows(clips / "rows.jsonl", ASR), clips / "run" / "bad-samples.jsonl")


def noted(clips: Path) -> list[tuple[int | None, str, str]]:
    path = clips / "run" / "bad-samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["step"], line["place"], line["kind"]) for line in lines]


def test_good_rows_are_read_as_they_are(clips):
    row = steady(clips)[7, 2]
    np.testing.assert_allclose(row["audio"]["array"], speech(3.0, seed=2), atol=1e-4)
    assert (row["text"], row["step"], row["audio"]["sampling_rate"]) == ("clip 2", 7, RATE)
    assert noted(clips) == []


def test_the_next_row_takes_the_place_of_one_that_went_bad_and_the_reason_is_noted(clips):
    rows = steady(clips)
    (clips / "0.wav").unlink()
    whole = (clips / "1.wav").read_bytes()
    (clips / "1.wav").write_bytes(whole[:-1000])
    soundfile.write(clips / "3.wav", speech(9.0), RATE)
    assert [rows[5, number]["text"] for number in range(4)] == ["clip 2", "clip 2", "clip 2", "clip 2"]
    assert noted(clips) == [
        (5, "line 1", "missing"),
        (5, "line 2", "cut"),
        (5, "line 2", "cut"),
        (5, "line 4", "changed"),
        (5, "line 1", "missing"),
        (5, "line 2", "cut"),
    ]
    (clips / "1.wav").write_bytes(whole)  # the disk is there again
    assert rows[6, 1]["text"] == "clip 1"


def test_a_disk_that_fails_for_a_moment_is_asked_again(clips, monkeypatch):
    rows, failures, pauses = steady(clips), iter([OSError(5, "Input/output error")] * 2), []
    load = skipping.load_samples

    def failing(part):
        for failure in failures:
            raise failure
        return load(part)

    monkeypatch.setattr(skipping, "load_samples", failing)
    monkeypatch.setattr(skipping.time, "sleep", pauses.append)
    assert rows[0, 1]["text"] == "clip 1"
    assert pauses == [1.0, 5.0] and noted(clips) == []


def test_where_no_row_can_be_read_the_run_ends(clips):
    rows = steady(clips)
    for number in range(4):
        os.remove(clips / f"{number}.wav")
    with pytest.raises(RuntimeError, match="4 rows one after the other can't be read, the last is line 4"):
        rows[0, 0]


def test_more_than_the_share_is_an_error_and_a_step_that_comes_again_counts_once(clips, capsys):
    rows = steady(clips)
    (clips / "0.wav").unlink()
    report = ReportBadSamples(rows.journal, share=0.002, samples_per_step=4)
    state = SimpleNamespace(global_step=10, is_world_process_zero=True)
    for _ in range(3):
        assert [rows[step, 0]["text"] for step in (1, 2)] == ["clip 1", "clip 1"]
    report.on_step_end(None, state, None)
    report.on_train_end(None, state, None)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("# 2 samples were skipped (2 missing); all of them are in ")
    assert len(printed) == 3 and f"line 1: {clips / '0.wav'}: audio file not found" in printed[1]
    rows[3, 0]
    with pytest.raises(
        RuntimeError, match=r"3 samples of 1000 could not be read \(3 missing\), .* max_bad_share 0.002"
    ):
        report.on_step_end(None, state, None)


@pytest.fixture
def one_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the fifth clip can't be read."""
    load = skipping.load_samples

    def gone(part):
        if str(part["audio"]).endswith("4.wav"):
            raise FileNotFoundError(f"audio file not found: {part['audio']}")
        return load(part)

    monkeypatch.setattr(skipping, "load_samples", gone)


def test_a_run_goes_on_past_a_bad_sample_and_lists_it(one_is_gone, checkpoint, data, tmp_path, capsys):
    trained(ctc, checkpoint, data, tmp_path / "out")
    listed = [line for line in capsys.readouterr().out.splitlines() if "samples were skipped" in line]
    assert len(listed) == 1 and " missing)" in listed[0]
    lines = [json.loads(line) for line in (tmp_path / "out" / "bad-samples.jsonl").read_text().splitlines()]
    assert {line["place"] for line in lines} == {"line 5"}


def test_a_run_that_allows_no_bad_sample_ends_with_an_error(one_is_gone, checkpoint, data, tmp_path):
    with pytest.raises(RuntimeError, match="more than max_bad_share 0"):
        dct.main(arguments(dct, checkpoint, data, tmp_path / "strict", "--max_bad_share", 0))


@pytest.mark.slow
def test_a_stage_trains_on_a_stream_and_resumes_it(checkpoint, data, tmp_path):
    contents = [(data / "clips" / f"{number}.wav").read_bytes() for number in (1, 2, 3)]
    rows = {"audio": [{"bytes": content, "path": None} for content in contents]}
    rows |= {"question": ["Who?"] * 3, "answer": ["dog", "mat", "cat"]}
    saved = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
    (tmp_path / "corpus").mkdir()
    saved.to_parquet(tmp_path / "corpus" / "train.parquet")

    def run(folder: str, *more: object):
        stream = ["--train_data", f"stream:{tmp_path / 'corpus'}#train", *more]
        return trained(dct, checkpoint, data, tmp_path / folder, *stream)

    whole = run("whole")
    with pytest.raises(ValueError, match="is a stream, which has no end; set max_steps"):
        run("endless", "--max_steps", -1)
    dct.main(
        arguments(
            dct,
            checkpoint,
            data,
            tmp_path / "cut",
            "--train_data",
            f"stream:{tmp_path / 'corpus'}#train",
            "--save_strategy",
            "steps",
            "--save_steps",
            2,
        )
    )
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "cut" / name).unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    resumed = run("cut", "--save_strategy", "steps", "--save_steps", 2)
    assert all((whole[name] == resumed[name]).all() for name in whole)
