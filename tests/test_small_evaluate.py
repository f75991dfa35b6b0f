"""The small model's evaluation: which rows it scores, that a stopped run goes on, and the figures on its page."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fastlongspeech.small import evaluate, report, speed

READERS = ("resemblyzer", "librispeech_samples", "ljspeech_coqui", "hifitts_6097")


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def corpus(tmp_path):
    """A corpus and human speech of one clip a set, all of them the same noise of 11 s."""
    folder, speech = tmp_path / "corpus", tmp_path / "speech"
    names = ["kokoro/test/a.wav", "kokoro/test-clips/0.wav", "human/p.wav"]
    paths = [folder / name for name in names]
    paths += [speech / f"{reader}/0.wav" for reader in (*READERS, "accented")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(11 * 16_000), 16_000)
    write(folder / "test.jsonl", [{"audio": name, "text": "a hare ran"} for name in names[:2]])
    asked = {"question": "Who ran?", "answer": "a hare", "answers": ["a hare", "the hare"]}
    tasks = [
        {"audio": names[0], "task": "question", **asked},
        {"audio": names[0], "task": "question", **asked, "question": "What ran?"},
        {"audio": names[0], "task": "not_said", "question": "Who slept?", "answer": "It is not said."},
        {"audio": names[0], "task": "gender", "question": "A man or a woman?", "answer": "A man."},
        {"task": "text", "passage": "a hare ran", "audio": "", **asked},
    ]
    write(folder / "tasks-test.jsonl", tasks)
    write(folder / "tasks-human.jsonl", [{"audio": names[2], "passage": "a hare ran", **asked}])
    write(speech / "test.jsonl", [{"audio": f"{reader}/0.wav", "text": "A HARE RAN"} for reader in READERS])
    write(speech / "test_accented.jsonl", [{"audio": "accented/0.wav", "text": "A HARE RAN"}])
    return folder, speech


def test_every_set_has_its_rows_and_the_text_of_its_passage(corpus):
    rows = {name: asked.rows(*corpus) for name, asked in evaluate.SETS.items()}
    assert {name: len(found) for name, found in rows.items()} == dict.fromkeys(rows, 1) | {"passages": 2}
    assert all(Path(row["audio"]).is_file() for found in rows.values() for row in found)
    assert {row["passage"] for name in ("passages", "people", "not-said") for row in rows[name]} == {"a hare ran"}
    assert rows["voices"][0]["choices"] == ["A man.", "A woman."]


def test_a_corpus_that_lacks_a_set_is_refused(corpus):
    (corpus[0] / "tasks-test.jsonl").write_text("")
    with pytest.raises(ValueError, match="make the corpus complete first"):
        evaluate.SETS["passages"].rows(*corpus)


def test_every_condition_is_run_once_and_fills_the_page(corpus, checkpoint, tmp_path, monkeypatch, capsys):
    some = [
        ("kokoro", "ctc", None),
        ("kokoro", "iterative_fusion", 400),
        ("passages", "true_transcript", None),
        ("passages", "iterative_fusion", 25),
        ("voices", "iterative_fusion", 400),
    ]
    assert set(some) < set(evaluate.conditions())
    monkeypatch.setattr(evaluate, "conditions", lambda: iter(some))
    words = [str(corpus[0]), "--speech", str(corpus[1]), "--model", str(checkpoint), "--output", str(tmp_path / "out")]
    page = tmp_path / "page.md"
    evaluate.main(words)
    assert capsys.readouterr().err.count(" of 5: ") == 5
    assert not page.exists()
    evaluate.main([*words, "--page", str(page)])
    assert " of 5: " not in capsys.readouterr().err  # all were there
    text = page.read_text()
    assert "| reads the true transcript |" in text and "| hears, L = 25 |" in text
    assert "passages by natural voices (2 questions)" in text


def scored(output: Path, condition: str, rows: list[dict]) -> None:
    write(output / condition / "predictions.jsonl", rows)
    (output / condition / "summary.json").write_text(
        json.dumps({"versions": {"torch": "2"}, "run": {"device": "cpu"}})
    )


def line(page: Path, beginning: str) -> list[str]:
    (found,) = [text for text in page.read_text().splitlines() if text.startswith(f"| {beginning} |")]
    return [cell.strip() for cell in found.split("|")[2:-1]]


def test_figures_are_shares_of_sums_with_intervals(tmp_path):
    def heard(row, recording, errors, words):
        return {"row": row, "recording": recording, "word_errors": errors, "words": words}

    def answered(row, recording, f1):
        return {"row": row, "recording": recording, "prediction": "a hare", "token_f1": f1}

    # The language model wrote down the second clip alone: 3 errors, where the CTC decoder made 2 in ten words.
    scored(tmp_path, "kokoro/ctc", [heard(0, "a", 1, 10), heard(1, "b", 2, 10)])
    scored(tmp_path, "kokoro/iterative_fusion-400", [heard(1, "b", 3, 10)])
    scored(tmp_path, "passages/true_transcript", [answered(0, "a", 1.0), answered(1, "a", 0.5), answered(2, "b", 0.5)])
    scored(tmp_path, "passages/iterative_fusion-400", [answered(n, "ab"[n // 2], 0.5) for n in range(3)])
    titles = {"kokoro": ("voices", "asr"), "passages": ("passages", "qa"), "people": ("people", "qa")}
    report.write_page(tmp_path / "page.md", tmp_path, titles, (400, 200))

    clips, ctc, some, same, written, share = line(tmp_path / "page.md", "voices")
    assert (clips, some) == ("2", "1")
    assert ctc == "15.0 [10.0, 20.0]"  # of two clips drawn with replacement: both the first, or both the second
    assert same == "20.0 [20.0, 20.0]" and written == "30.0 [30.0, 30.0]" and share == "150.0 [150.0, 150.0]"
    f1, share, *people = line(tmp_path / "page.md", "hears, L = 400")
    assert f1 == "50.0 [50.0, 50.0]" and share == "75.0 [66.7, 100.0]"  # 1.5 of 2.0; of a alone 1.0 of 1.5
    assert people == ["–", "–"]
    assert line(tmp_path / "page.md", "hears, L = 200") == ["–"] * 4


def test_the_native_sets_count_together_where_all_are_there(tmp_path):
    for number, name in enumerate(report.HUMAN):
        rows = [{"row": 0, "recording": name, "word_errors": number, "words": 10}]
        scored(tmp_path, f"{name}/ctc", rows)
        if (name, "iterative_fusion", 400) in evaluate.conditions():  # of LJSpeech no clip is long enough
            scored(tmp_path, f"{name}/iterative_fusion-400", rows)
    titles = {name: (name, "asr") for name in report.HUMAN} | {"passages": ("p", "qa"), "people": ("q", "qa")}
    report.write_page(tmp_path / "page.md", tmp_path, titles, ())
    clips, ctc, long, _, written, _ = line(tmp_path / "page.md", "all four native sets")
    assert clips == "4" and ctc.startswith("15.0 [")  # 0 + 1 + 2 + 3 of 40
    assert long == "3" and written.startswith("13.3 [")  # 0 + 1 + 3 of 30


def test_an_answer_that_nothing_is_said_is_wrong_where_it_is_said(tmp_path):
    rows = [
        {"row": number, "recording": str(number), "prediction": text, "token_f1": 0}
        for number, text in enumerate(["It is not said.", "A hare.", "it is not said", "No."])
    ]
    scored(tmp_path, "passages/iterative_fusion-400", rows)
    report.write_page(tmp_path / "page.md", tmp_path, {"passages": ("p", "qa"), "people": ("q", "qa")}, ())
    asked = "a question that the passage answers: any other answer"
    assert line(tmp_path / "page.md", asked) == ["4", "50.0 [0.0, 100.0]"]


def test_ways_are_timed_in_turn_and_scored_on_the_same_questions(corpus, checkpoint, tmp_path, monkeypatch):
    heard = []

    def transcribe(path):
        heard.append(path)
        return "a hare ran"

    monkeypatch.setattr(speed, "Whisper", lambda name, device, kind: transcribe)
    words = [str(corpus[0]), "--speech", str(corpus[1]), "--model", str(checkpoint), "--seconds", "3", "2"]
    (corpus[1] / "test_long.jsonl").write_text((corpus[1] / "test_accented.jsonl").read_text())
    page, output = tmp_path / "page.md", tmp_path / "speed"
    words += ["--page", str(page), "--output", str(output)]
    speed.main([*words, "--repeats", "2"])
    journal = output / "results.jsonl"
    _, short, long, asked = map(json.loads, journal.read_text().splitlines())
    assert [short["seconds"], long["seconds"]] == [2, 3]
    assert {len(runs) for row in (short, long) for runs in row["runs"].values()} == {2}  # the first warmed up
    assert len(heard) == 2 * (3 + 2 + 1)  # int8 and float32; of 2 s, of 3 s, and of the questions
    (whisper,) = [row for row in asked["scores"] if row["way"] == "faster-whisper, int8"]
    assert whisper["word_errors"] == [0, 3] and len(whisper["f1"]) == 1
    assert line(page, "faster-whisper, int8")[-1] == "0.0"

    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))  # stopped after 2 s
    heard.clear()
    speed.main([*words, "--repeats", "2"])
    assert len(heard) == 2 * (3 + 1)  # of 3 s, and of the questions
    assert line(page, "faster-whisper, int8")[-1] == "0.0"
    with pytest.raises(ValueError, match="holds results with repeats 2, not 1"):
        speed.main([*words, "--repeats", "1"])


def test_a_transcript_beyond_the_context_is_said_not_hidden(model, processor, tmp_path):
    read = speed.ways(model, processor, {"int8": lambda path: "a " * 50_000})["faster-whisper, int8"]
    assert read("x.wav", ["Who?"], 4)[0] == [speed.TOO_LONG]


def test_a_recording_is_joined_to_the_length_that_is_asked_for(corpus, tmp_path):
    (corpus[1] / "test_long.jsonl").write_text((corpus[1] / "test_accented.jsonl").read_text())
    assert soundfile.info(speed.joined(corpus[1], 50, tmp_path / "a.flac")).duration == 50
    with pytest.raises(ValueError, match="5 s too little speech for a recording of 60 s"):
        speed.joined(corpus[1], 60, tmp_path / "a.flac")
