"""Sources beside one manifest: several with weights, tar files, and streams; their order is kept by a resumed run."""

import io
import json
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
from conftest import CLIP_SECONDS, RATE, speech, write_rows
from torch.utils.data import DataLoader

from fastlongspeech.data.audio import load_samples
from fastlongspeech.data.manifests import load_rows
from fastlongspeech.data.mixing import Mixture, load_training_rows
from fastlongspeech.data.streams import StreamRows, open_stream
from fastlongspeech.train.batches import StepSampler
from fastlongspeech.train.skipping import SteadyStream

ASR, QA = ("audio", "text"), ("audio", "question", "answer")


# Several manifests with weights


def test_a_mixture_gives_every_source_its_share_and_every_row_of_it_equally_often():
    mixture = Mixture([6, 90], [1, 2])
    taken: Counter[int] = Counter()
    for epoch in range(9):
        rows = mixture.rows_of(0, epoch)
        assert len(rows) == 96 and sum(row < 6 for row in rows) == 32
        taken.update(rows.tolist())
    assert {taken[row] for row in range(6)} == {9 * 32 // 6}
    assert {taken[row] for row in range(6, 96)} == {6, 7}  # 9 * 64 / 90 = 6.4


def test_the_shares_add_up_to_an_epoch_and_the_order_depends_on_seed_and_epoch():
    mixture = Mixture([5, 7, 3], [0.2, 0.5, 0.3])
    assert mixture.counts.tolist() == [3, 8, 4]
    orders = [mixture.rows_of(seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert orders[0] == orders[1] and orders[0] != orders[2] and orders[0] != orders[3]


def test_steps_follow_the_mixture_and_a_resumed_run_goes_on_in_its_order():
    mixture, taken = Mixture([4, 12], [3, 1]), 0
    sampler = StepSampler([1.0] * 16, 4, 7, lambda: taken, mixture=mixture)
    first, second = list(sampler), None
    assert [step for step, _ in first] == [step for step in range(4) for _ in range(4)]
    assert sorted(row for _, row in first) == sorted(mixture.rows_of(7, 0).tolist())
    taken = 4
    second = list(sampler)
    taken = 6  # resumed within the second epoch: the Trainer skips the batches already seen
    assert list(sampler) == second and second[0][0] == 4
    assert sorted(row for _, row in second) == sorted(mixture.rows_of(7, 1).tolist())


def test_a_yaml_file_names_manifests_and_their_weights(data, tmp_path):
    clips = [{"audio": str(data / "clips" / f"{n}.wav"), "text": f"clip {n}"} for n in range(1, 4)]
    write_rows(tmp_path / "a.jsonl", clips[:1])
    write_rows(tmp_path / "b.jsonl", clips[1:])
    (tmp_path / "mix.yaml").write_text("a.jsonl: 1\nb.jsonl: 0.5\n")
    rows = load_training_rows(str(tmp_path / "mix.yaml"), ASR)
    assert rows.mixture.counts.tolist() == [2, 1]
    assert [rows[n]["text"] for n in range(3)] == rows.texts("text") == ["clip 1", "clip 2", "clip 3"]
    assert rows.durations == pytest.approx(CLIP_SECONDS[1:4])
    assert rows.places == [f"{tmp_path / 'a.jsonl'}, line 1"] + [f"{tmp_path / 'b.jsonl'}, line {n}" for n in (1, 2)]
    assert rows[8 // 4, 2] == rows[2] | {"step": 2} and rows.at(5)[0]["target_length"] == 5
    (tmp_path / "mix.yaml").write_text("a.jsonl:\nb.jsonl:\n")
    mixture = load_training_rows(str(tmp_path / "mix.yaml"), ASR).mixture
    assert sorted(mixture.rows_of(0, 3).tolist()) == [0, 1, 2]  # without weights every row once
    (tmp_path / "mix.yaml").write_text("a.jsonl: -1\n")
    with pytest.raises(ValueError, match="gives a.jsonl the weight -1; it must be a positive number"):
        load_training_rows(str(tmp_path / "mix.yaml"), ASR)


# Tar files


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sound(seconds: float, form: str = "FLAC", seed: int = 0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, speech(seconds, seed=seed), RATE, format=form)
    return file.getvalue()


def test_tar_files_give_rows_whose_recordings_are_read_where_they_lie(tmp_path):
    first = {"en/a1.flac": sound(1.0), "en/a1.json": json.dumps({"text": "one", "duration": 1.0}).encode()}
    write_tar(tmp_path / "s-000.tar", first | {"en/a2.txt": b"two\n", "en/a2.wav": sound(2.0, "WAV", 1)})
    write_tar(tmp_path / "s-001.tar", {"b.ogg": sound(3.0, "OGG"), "b.json": b'{"text": "three", "start": 1}'})
    rows = load_rows(tmp_path / "s-*.tar", ASR)
    assert rows.texts("text") == ["one", "two", "three"]
    assert rows.durations == pytest.approx([1.0, 2.0, 2.0], abs=0.02)
    assert rows.places == ["s-000.tar, en/a1", "s-000.tar, en/a2", "s-001.tar, b"]
    np.testing.assert_allclose(load_samples(rows[1]), speech(2.0, seed=1), atol=1e-4)
    assert len(load_samples(rows[2])) == pytest.approx(2 * RATE, abs=RATE / 50)


def test_a_tar_file_may_hold_conversations(tmp_path):
    asked = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Who?"}]}
    chat = {"messages": [asked, {"role": "assistant", "content": "Anna."}]}
    write_tar(tmp_path / "c.tar", {"x.wav": sound(1.0, "WAV"), "x.json": json.dumps(chat).encode()})
    row = load_rows(tmp_path / "c.tar", QA)[0]
    assert row["answer"] == "Anna." and len(load_samples(row["messages"][0]["content"][0])) == RATE


def test_a_bad_row_of_a_tar_file_is_named_and_a_compressed_one_refused(tmp_path):
    cut = sound(1.0, "WAV")[:-500]
    members = {"a.txt": b"no sound", "b.wav": cut, "b.txt": b"cut", "c.flac": sound(1.0), "c.json": b"[1]"}
    write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(ValueError, match="has 3 bad rows") as refusal:
        load_rows(tmp_path / "bad.tar", ASR)
    lines = str(refusal.value).splitlines()
    assert "bad.tar, a has the members txt; it needs one recording" in lines[1]
    assert "bad.tar, b has a recording that can't be read" in lines[2]
    assert "bad.tar, c has a .json that holds a list" in lines[3]
    with tarfile.open(tmp_path / "small.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match="small.tar can't be read as a tar file .*not compressed"):
        load_rows(tmp_path / "small.tar", ASR)


# Streams


@pytest.fixture
def corpus(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of four Parquet files of three rows, whose texts are their numbers."""
    # `datasets` waits 5 s after every Parquet stream, for threads that read over a network.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    content = (data / "clips" / "1.wav").read_bytes()
    for file in range(4):
        rows = {"audio": [{"bytes": content, "path": None}] * 3, "transcript": [f"{file}{n}" for n in range(3)]}
        saved = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
        (tmp_path / "corpus").mkdir(exist_ok=True)
        saved.to_parquet(tmp_path / "corpus" / f"train-{file}.parquet")
    return tmp_path / "corpus"


def start(step: int, process: int = 0, processes: int = 1, **more: int) -> dict[str, int]:
    asked = {"seed": 3, "first_step": step, "batch_size": 2, "accumulation": 1} | more
    return asked | {"process": process, "processes": processes}


def texts(stream: StreamRows, samples: int, **asked: int) -> list[tuple[int, str]]:
    return [(row.step, row.row["text"]) for row in islice(stream.arriving(**asked), samples)]


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_every_row_of_a_stream_goes_to_one_process_in_every_epoch(corpus, processes):
    stream = open_stream(f"stream:{corpus}#train", ASR)
    everything = {f"{file}{n}" for file in range(4) for n in range(3)}
    own = [list(islice(stream._part(p, processes, 0), 12)) for p in range(processes)]
    first = [row["text"] for rows in own for place, row in rows if place.startswith("epoch 0")]
    assert sorted(first) == sorted(everything)
    if processes == 1:
        again = [row["text"] for _, row in islice(stream._part(0, 1, 0), 24)]
        assert sorted(again[12:]) == sorted(everything) and again[12:] != again[:12] != sorted(everything)


def test_a_stream_is_resumed_at_the_row_where_it_was(corpus):
    stream = open_stream(f"stream:{corpus}", ASR)
    for process in range(2):
        whole = texts(stream, 24, **start(0, process, 2, accumulation=2))
        assert [step for step, _ in whole] == [n // 4 for n in range(24)]
        assert texts(stream, 16, **start(2, process, 2, accumulation=2)) == whole[8:]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_of_a_data_loader_share_a_stream_and_resume_it(corpus, tmp_path, workers):
    def loaded(step: int, batches: int) -> list[list[tuple[int, str]]]:
        steady = SteadyStream(open_stream(f"stream:{corpus}", ASR), tmp_path / "bad.jsonl", lambda: start(step))
        loader = DataLoader(steady, batch_size=2, num_workers=workers, collate_fn=list)
        return [[(row["step"], row["text"]) for row in batch] for batch in islice(loader, batches)]

    whole = loaded(0, 8)
    assert [step for batch in whole for step, _ in batch] == [n // 2 for n in range(16)]
    assert loaded(3, 5) == whole[3:]
    assert len({text for batch in whole[:6] for _, text in batch}) >= 9  # workers may differ in how far they are


def test_a_bad_row_of_a_stream_is_noted_and_keeps_its_place(tmp_path):
    good = sound(1.0, "WAV")
    held = [(good, "a"), (good, "b"), (b"nothing", "c"), (good, " "), (good, "e")]
    rows = {"audio": [{"bytes": content, "path": None} for content, _ in held], "text": [text for _, text in held]}
    saved = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
    stream = StreamRows("s", ASR, saved.to_iterable_dataset())
    order = [row.row["text"] for row in islice(stream.arriving(**start(0)), 5)]
    steady = SteadyStream(stream, tmp_path / "bad.jsonl", lambda: start(0))
    heard: list[Any] = [row["text"] for row in islice(steady, 10)]
    noted = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in noted} == {"unreadable", "unusable"} and len(noted) >= 3
    assert set(heard) <= {"a", "b", "e"} and len(set(order)) == 5


def test_a_stream_that_does_not_exist_or_has_no_audio_is_refused(tmp_path):
    with pytest.raises(ValueError, match="can't be streamed: .*check its name and its split"):
        open_stream(f"stream:{tmp_path / 'nothing'}", ASR)
    (tmp_path / "texts").mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "texts" / "train.parquet")
    with pytest.raises(ValueError, match="has the columns text; audio must be among them"):
        open_stream(f"stream:{tmp_path / 'texts'}", ASR)
