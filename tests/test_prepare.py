"""Published datasets become manifests: from their Hub form and their makers', on small copies with their columns."""

import json
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pytest
import soundfile
from conftest import RATE, speech

from fastlongspeech.app import cli
from fastlongspeech.data import prepare as command
from fastlongspeech.data.corpora import INSTRUCTIONS, LIBRISPEECH_TRAIN
from fastlongspeech.data.manifests import load_rows

ASR, QA = ("audio", "text"), ("audio", "question", "answer")


def write(path: Path, seconds: float, rate: int = RATE) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, speech(seconds, rate), rate)
    return str(path)


def encoded(name: str, seconds: float) -> dict[str, Any]:
    """A recording as the Hub's Parquet files hold it."""
    file = BytesIO()
    soundfile.write(file, speech(seconds), RATE, format="FLAC")
    return {"bytes": file.getvalue(), "path": name}


def prepare(output: Path, *arguments: object) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of the manifest that the command writes, and its summary."""
    command.main([*map(str, arguments), "--output", str(output)])
    (summary,) = output.glob("*.summary.json")
    manifest = summary.with_name(summary.name.replace(".summary.json", ".jsonl"))
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").split("\n") if line]
    columns = QA if "question" in rows[0] else ASR
    assert load_rows(manifest, columns).durations == pytest.approx([row["duration"] for row in rows], abs=1e-3)
    assert not list(output.glob("*.journal"))
    return rows, json.loads(summary.read_text())


def save_hub_form(folder: Path, config: str, splits: dict[str, list[dict[str, Any]]]) -> Path:
    """A copy of a repository of the Hub: Parquet files, and a card that says which split each is."""
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, rows in splits.items():
        (folder / config).mkdir(parents=True, exist_ok=True)
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        data = datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(RATE, decode=False))
        data.to_parquet(folder / config / f"{split}.parquet")
        lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


# LibriSpeech


@pytest.fixture
def librispeech(tmp_path: Path) -> Path:
    """The folders that the archives of LibriSpeech unpack to, with a clip that is too long."""
    root = tmp_path / "LibriSpeech"
    for number, folder in enumerate([*LIBRISPEECH_TRAIN, "test-clean"]):
        chapter = root / folder / "19" / "198"
        lines = []
        for clip, seconds in enumerate([1.5, 2.0 + number, 30.5]):
            name = f"19-198-{number}{clip:03d}"
            write(chapter / f"{name}.flac", seconds)
            lines.append(f"{name} NORTHANGER ABBEY {'AB'[clip % 2]} DON'T")
        (chapter / "19-198.trans.txt").write_text("\n".join(lines) + "\n")
    return root


def test_librispeech_as_its_archives_unpack(librispeech, tmp_path):
    rows, summary = prepare(tmp_path / "out", "librispeech", "--source", librispeech.parent)
    assert len(rows) == summary["rows"] == 6 and summary["dropped"] == {"over 30 s": 3}
    audio = "../LibriSpeech/train-clean-100/19/198/19-198-0000.flac"
    assert rows[0] == {"audio": audio, "text": "northanger abbey a don't", "speaker": "19", "duration": 1.5}
    assert summary["hours"] == pytest.approx(sum(row["duration"] for row in rows) / 3600, abs=1e-3)
    dropped = (tmp_path / "out" / "librispeech-train.dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["seconds"] for line in dropped] == [30.5] * 3
    rows, _ = prepare(tmp_path / "test", "librispeech", "--source", librispeech, "--split", "test-clean")
    assert [row["duration"] for row in rows] == [1.5, 5.0]


def test_librispeech_as_the_hub_has_it(tmp_path):
    def row(name: str, seconds: float, text: str) -> dict[str, Any]:
        audio = encoded(f"{name}.flac", seconds)
        ids = {"speaker_id": 374, "chapter_id": 180298, "id": name}
        return {"file": f"{name}.flac", "audio": audio, "text": text, **ids}

    splits = {
        folder.replace("-", "."): [
            row(f"374-180298-000{n}", 1.0 + n, "CHAPTER SIXTEEN"),
            row(f"374-1-{n}", 31, "LONG"),
        ]
        for n, folder in enumerate(LIBRISPEECH_TRAIN)
    }
    hub = save_hub_form(tmp_path / "hub", "all", splits)
    rows, summary = prepare(tmp_path / "out", "librispeech", "--source", hub)
    assert [row["duration"] for row in rows] == [1.0, 2.0, 3.0] and summary["dropped"] == {"over 30 s": 3}
    assert rows[0] | {"audio": ""} == {"audio": "", "text": "chapter sixteen", "speaker": "374", "duration": 1.0}
    kept = (tmp_path / "out" / rows[0]["audio"]).read_bytes()
    assert kept == splits["train.clean.100"][0]["audio"]["bytes"]  # as it came, not coded again


# MLS


def test_mls_as_its_archive_unpacks_and_some_hours_of_it(tmp_path):
    folder = tmp_path / "mls_english" / "train"
    names = [f"{speaker}_{book}_{n:06d}" for speaker, book in ((4800, 10003), (92, 7)) for n in range(4)]
    for name in names:
        speaker, book, _ = name.split("_")
        write(folder / "audio" / speaker / book / f"{name}.flac", 10.0)
    (folder / "transcripts.txt").write_text("".join(f"{name}\tthe words of {name}\n" for name in names))
    rows, _ = prepare(tmp_path / "all", "mls", "--source", folder.parent)
    assert [row["text"] for row in rows] == [f"the words of {name}" for name in names]
    assert rows[0]["speaker"] == "4800" and rows[0]["duration"] == 10.0
    some = [
        prepare(tmp_path / f"s{s}", "mls", "--source", folder.parent, "--hours", 0.01, "--seed", s) for s in (1, 2)
    ]
    assert all(summary["rows"] == 4 for _, summary in some)  # the fourth clip reaches 36 s
    assert {row["text"] for row in some[0][0]} != {row["text"] for row in some[1][0]}


def test_mls_as_the_hub_has_it(tmp_path):
    rows = [
        {
            "audio": encoded("a.flac", 12.0),
            "original_path": "http://www.archive.org/download/x/x_64kb.mp3",
            "begin_time": 10.5 + 12 * n,
            "end_time": 22.5 + 12 * n,
            "transcript": f"it is number {n}",
            "audio_duration": 12.0,
            "speaker_id": "4800",
            "book_id": "10003",
        }
        for n in range(3)
    ]
    hub = save_hub_form(tmp_path / "hub", "default", {"train": rows})
    found, _ = prepare(tmp_path / "out", "mls", "--source", hub)
    assert [row["text"] for row in found] == ["it is number 0", "it is number 1", "it is number 2"]
    assert len({row["audio"] for row in found}) == 3


# OpenASQA and LibriSQA: questions, recordings elsewhere


def test_the_open_questions_about_speech_of_openasqa(tmp_path):
    write(tmp_path / "LibriTTS" / "train-clean-100" / "19" / "198" / "19_198_000000_000000.wav", 2.0, 24000)

    def row(dataset: str, task: str, audio: str, output: str = "She sounds glad.") -> dict[str, str]:
        asked = {"instruction": "What mood does the voice convey?", "input": "northanger abbey", "audio_id": audio}
        return asked | {"dataset": dataset, "task": task, "output": output}

    speech_path = "/data/sls/LibriTTS/train-clean-100/19/198/19_198_000000_000000.flac"
    rows = [
        row("libritts_tr", "open-ended question", speech_path),
        row("libritts_tr", "gender_cla", speech_path),
        row("as_strong_train", "open-ended question", "/data/sls/audioset/x.flac"),
        row("libritts_tr", "open-ended question", "/data/sls/LibriTTS/train-clean-100/19/198/gone.flac"),
        row("libritts_tr", "open-ended question", speech_path, output=" "),
    ]
    (tmp_path / "openasqa.json").write_text(json.dumps(rows))
    arguments = ["openasqa", "--source", tmp_path / "openasqa.json", "--audio-root", tmp_path / "LibriTTS"]
    found, summary = prepare(tmp_path / "out", *arguments)
    assert [(row["question"], row["answer"]) for row in found] == [
        ("What mood does the voice convey?", "She sounds glad.")
    ]
    assert summary["dropped"] == {
        "a question that is not open-ended (gender_cla)": 1,
        "not about speech (as_strong_train)": 1,
        "no such recording": 1,
        "empty text": 1,
    }


@pytest.mark.parametrize("split", ["partI.train", "partII.train", "partII.test"])
def test_both_parts_of_librisqa_by_the_folder_or_the_file(librispeech, tmp_path, split):
    part, _, which = split.partition(".")
    folder = "test-clean" if which == "test" else "train-clean-360"
    clip = sorted((librispeech / folder).glob("*/*/*.flac"))[0]
    row = {"speech_path": str(Path("/their/disk/LibriSpeech") / clip.relative_to(librispeech).with_suffix(".wav"))}
    row |= {"text": "NORTHANGER ABBEY", "duration": 1.5}
    if part == "partI":
        row |= {"question": "Which abbey is it?", "answer": "It is Northanger."}
    else:
        options = "Which abbey is it?\nA. Northanger\nB. Melrose\nC. Tintern\nD. Fountains"
        row |= {"question_and_option": options, "answer": "A", "answer_and_analysis": "A. The title is read."}
    name = f"LibriSQA-P{part[1:]}"
    file = tmp_path / "sqa" / name / f"{name}-{which}.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([row]))
    for number, source in enumerate((tmp_path / "sqa", file)):
        arguments = ["librisqa", "--source", source, "--split", split, "--audio-root", librispeech]
        (found,), _ = prepare(tmp_path / f"out{number}", *arguments)
        assert found["duration"] == 1.5
        asked = ("Which abbey is it?", "It is Northanger.") if part == "partI" else (options, "A. The title is read.")
        assert (found["question"], found["answer"]) == asked


# Common Voice

COLUMNS = [
    "client_id",
    "path",
    "sentence_id",
    "sentence",
    "sentence_domain",
    "up_votes",
    "down_votes",
    "age",
    "gender",
]
COLUMNS += ["accents", "variant", "locale", "segment"]


def save_common_voice(root: Path, split: str, clips: dict[str, tuple[float, str]]) -> Path:
    """A release of Common Voice, as it unpacks: a table for each split, clips as MP3."""
    lines = ["\t".join(COLUMNS)]
    for name, (seconds, sentence) in clips.items():
        write(root / "clips" / f"{name}.mp3", seconds, 32000)
        said = {"client_id": f"client{name}", "path": f"{name}.mp3", "sentence": sentence, "locale": "en"}
        lines.append("\t".join(said.get(column, "") for column in COLUMNS))
    (root / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def test_common_voice_asks_one_of_200_instructions_drawn_by_the_seed(tmp_path):
    clips = {f"common_voice_en_{n}": (0.5, f'He said "{n}" twice') for n in range(40)}
    root = save_common_voice(tmp_path / "cv" / "en", "train", clips | {"long": (31.0, "x")})
    rows, summary = prepare(tmp_path / "a", "common-voice", "--source", root.parent)
    assert summary["dropped"] == {"over 30 s": 1} and summary["licence"] == "CC0"
    assert [row["answer"] for row in rows] == [row["text"] for row in rows] == [s for _, s in clips.values()]
    assert all(row["question"] in INSTRUCTIONS.read_text().splitlines() for row in rows)
    assert len({row["question"] for row in rows}) > 20
    again, _ = prepare(tmp_path / "b", "common-voice", "--source", root)
    other, _ = prepare(tmp_path / "c", "common-voice", "--source", root, "--seed", 1)
    assert [row["question"] for row in rows] == [row["question"] for row in again]
    assert [row["question"] for row in rows] != [row["question"] for row in other]


def test_the_200_instructions_are_200_and_differ_in_more_than_punctuation():
    instructions = INSTRUCTIONS.read_text(encoding="utf-8").splitlines()
    bare = Counter("".join(letter for letter in line.lower() if letter.isalnum()) for line in instructions)
    assert len(instructions) == 200 and bare.most_common(1)[0][1] == 1
    assert all(line == line.strip() and line[0].isupper() for line in instructions)


def test_common_voice_as_a_copy_on_the_hub_has_it(tmp_path):
    row = {"client_id": "x", "path": "en_test_0/common_voice_en_1.mp3", "audio": encoded("1.mp3", 1.0)}
    row |= {"sentence": "Well?", "up_votes": 2, "down_votes": 0, "age": "", "gender": "", "accent": "", "locale": "en"}
    hub = save_hub_form(tmp_path / "hub", "en", {"train": [row | {"segment": "", "variant": ""}]})
    (found,), _ = prepare(tmp_path / "out", "common-voice", "--source", hub)
    assert found["answer"] == "Well?" and found["duration"] == 1.0


# Going on, and what is refused


@pytest.mark.parametrize("hub", [False, True])
def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch, hub):
    clips = {f"common_voice_en_{n}": (0.5 if n % 3 else 31.0, f"sentence\u2028 {n}") for n in range(7)}
    source = save_common_voice(tmp_path / "cv", "train", clips)
    if hub:
        audio = {
            name: {"bytes": (source / "clips" / f"{name}.mp3").read_bytes(), "path": f"{name}.mp3"} for name in clips
        }
        rows = [
            {"client_id": "x", "path": name, "audio": audio[name], "sentence": s} for name, (_, s) in clips.items()
        ]
        source = save_hub_form(tmp_path / "hub", "en", {"train": rows})
    whole, _ = prepare(tmp_path / "whole", "common-voice", "--source", source)
    measured: list[str] = []
    measure = command.recording_seconds

    def stop_at_the_sixth(content, name):
        measured.append(Path(name).stem)
        if measured.count("common_voice_en_5") == 1 and measured[-1] == "common_voice_en_5":
            raise KeyboardInterrupt
        return measure(content, name)

    monkeypatch.setattr(command, "CHUNK", 2)
    monkeypatch.setattr(command, "recording_seconds", stop_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", "common-voice", "--source", source)
    journal = tmp_path / "out" / "common-voice-train.journal"
    assert journal.read_text(encoding="utf-8").count("\n") == 1 + 5
    with open(journal, "a") as file:
        file.write('{"audio": "../cv/cl')  # cut off by the stop
    assert prepare(tmp_path / "out", "common-voice", "--source", source)[0] == whole
    assert sorted(measured) == sorted([*clips, "common_voice_en_5"])


def test_what_is_there_is_not_overwritten_and_other_arguments_do_not_go_on(librispeech, tmp_path, capsys):
    arguments = ["prepare", "librispeech", "--source", str(librispeech), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 6
    assert cli.main(arguments) == 1
    assert "is there already; delete it to make it again" in capsys.readouterr().err
    (tmp_path / "out" / "librispeech-train.jsonl").unlink()
    (tmp_path / "out" / "librispeech-train.journal").write_text(json.dumps({"seed": "7"}) + "\n")
    assert cli.main(arguments) == 1
    assert "is of a run with other arguments" in capsys.readouterr().err


def test_a_wrong_folder_of_recordings_is_an_error_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "ENOUGH", 3)
    rows = [{"speech_path": f"a/{n}.flac", "question": "?", "answer": "!"} for n in range(5)]
    (tmp_path / "LibriSQA-PartI-train.json").write_text(json.dumps(rows))
    arguments = ["librisqa", "--source", str(tmp_path), "--audio-root", str(tmp_path)]
    with pytest.raises(ValueError, match="have no recording that can be read, such as .*.flac; check --source and"):
        prepare(tmp_path / "out", *arguments)


def test_wrong_arguments_are_told_before_anything_is_read(tmp_path, capsys):
    for arguments, told in (
        (["common-voice"], "has no public Hub form; download it, and name the copy with --source"),
        (["librisqa"], "librisqa needs --audio-root"),
        (["mls", "--split", "validation"], "--split must be one of train, dev, test, got validation"),
    ):
        with pytest.raises(SystemExit):
            command.main([*arguments, "--output", str(tmp_path)])
        assert told in capsys.readouterr().err
