"""`check-data` finds what would spoil a run, tells where it is, and fails."""

import shutil
from io import BytesIO
from pathlib import Path

import datasets
import matplotlib.image
import pytest
import soundfile
from conftest import RATE, speech, write_rows

from fastlongspeech.app import cli


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for number, seconds in enumerate([1.0, 2.0, 3.0, 12.0]):
        soundfile.write(tmp_path / f"{number}.flac", speech(seconds, seed=number), RATE)
    return tmp_path


def check(source: Path, capsys: pytest.CaptureFixture, *options: object) -> tuple[int, str, str]:
    status = cli.main(["check-data", str(source), *map(str, options)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def counts(page: str) -> dict[str, int]:
    """The figures of the report above the faults."""
    lines = [line.split(maxsplit=1) for line in page.splitlines()[1:9]]
    return {what: int(count) for count, what in lines if int(count)}


def test_a_manifest_without_faults_passes_with_a_histogram(clips, capsys):
    manifest = write_rows(clips / "good.jsonl", [{"audio": f"{n}.flac", "text": f"clip {n}"} for n in range(4)])
    status, page, _ = check(manifest, capsys, "--plot", clips / "durations.png")
    assert status == 0 and counts(page) == {}
    assert page.splitlines()[0] == f"{manifest}: 4 usable rows, 0.01 h"
    assert [line.split() for line in page.splitlines()[10:-1]] == [
        ["0", "to", "1", "0"],
        ["1", "to", "2", "1", "#" * 20],
        ["2", "to", "5", "2", "#" * 40],
        ["5", "to", "10", "0"],
        ["10", "to", "15", "1", "#" * 20],
    ]
    assert "not checked" in page.splitlines()[-1]
    assert matplotlib.image.imread(clips / "durations.png").std() > 0.01


def test_every_fault_is_counted_named_and_makes_the_command_fail(clips, ctc_model, capsys):
    (clips / "cut.flac").write_bytes((clips / "3.flac").read_bytes()[:-20_000])  # its header still says 12 s
    (clips / "noise.wav").write_bytes(b"RIFF nothing")
    shutil.copy(clips / "0.flac", clips / "copy.flac")
    rows = [
        {"audio": "0.flac", "text": "a cat"},
        {"audio": "nowhere.flac", "text": "a cat"},
        {"audio": "noise.wav", "text": "a cat"},
        {"audio": "cut.flac", "text": "a cat"},
        {"audio": "1.flac", "text": ""},
        {"audio": "1.flac", "text": "the cat sat " * 20},
        {"audio": "2.flac", "start": 0.5, "end": 0.7, "text": "the mat on a hill"},
        {"audio": "copy.flac", "text": "a cat"},
        {"audio": "2.flac", "start": 2, "end": 9, "text": "a cat"},
    ]
    manifest = write_rows(clips / "bad.jsonl", rows)
    status, page, error = check(manifest, capsys, "--ctc-model", ctc_model)
    assert status == 1 and "bad.jsonl has 9 faults; mend or remove these rows" in error
    assert counts(page) == {
        "recordings that do not exist": 1,
        "recordings that can't be read": 1,
        "recordings that are cut off or changed": 1,
        "parts that recordings do not have": 1,
        "rows without text or not of the manifest's form": 1,
        "texts that are too long": 1,
        "CTC labels that need more frames than there are": 2,
        "duplicates": 1,
    }
    for named in (
        "line 2 names the recording",
        "line 4 has a recording that can't be read to its end (audio",
        "line 6 has 240 characters in 2.0 s",
        "line 7 has a transcript that needs",
        "line 8 has the same recording as line 1",
        "line 9 has 'end' = 9",
    ):
        assert named in page
    status, page, _ = check(manifest, capsys, "--headers")
    assert "recordings that are cut off or changed" not in counts(page)  # a header does not show it


def test_the_questions_of_stage_2_may_share_a_recording_but_not_repeat(clips, capsys):
    def chat(name: str, answer: str) -> dict[str, object]:
        content = [{"type": "audio", "audio": name}, {"type": "text", "text": "Who?"}]
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}

    rows = [{"audio": "0.flac", "question": question, "answer": "Anna"} for question in ("Who?", "Where?", "Who?")]
    manifest = write_rows(clips / "qa.jsonl", [*rows, chat("1.flac", "Anna"), chat("1.flac", "x" * 50)])
    status, page, _ = check(manifest, capsys, "--max-characters", 40)
    assert status == 1 and counts(page) == {"texts that are too long": 1, "duplicates": 2}
    assert "line 3 has the same question about the same recording as line 1" in page
    assert "line 5 has 'answer' of 50 characters, more than 40" in page


def test_a_datasets_folder_is_checked_alike(clips, capsys):
    whole = BytesIO()
    soundfile.write(whole, speech(1.0), RATE, format="WAV")
    held = [whole.getvalue(), whole.getvalue(), whole.getvalue()[:-500]]
    column = [{"bytes": content, "path": None} for content in held]
    rows = datasets.Dataset.from_dict({"audio": column, "text": ["a", "a", "a"]})
    rows.cast_column("audio", datasets.Audio(decode=False)).save_to_disk(clips / "saved")
    status, page, _ = check(clips / "saved", capsys)
    assert status == 1
    assert counts(page) == {"recordings that are cut off or changed": 1, "duplicates": 1}
    assert "row 1 has the same recording as row 0" in page and "row 2 has a recording that can't be read" in page


def test_a_source_that_is_not_there_is_an_error(tmp_path, capsys):
    status, _, error = check(tmp_path / "no.jsonl", capsys)
    assert status == 1 and "no manifest, tar file or datasets folder" in error
