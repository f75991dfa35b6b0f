"""Evaluation by summaries, and the script that compares them with fusion and its rivals."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import RATE, speech, write_rows
from sklearn.metrics import f1_score

from fastlongspeech import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from fastlongspeech.app import cli
from fastlongspeech.app.session import Session
from fastlongspeech.data.tasks import load_questions
from fastlongspeech.evaluation import speech_xl
from fastlongspeech.evaluation.scoring import macro_f1


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with summary projections."""
    path = tmp_path_factory.mktemp("summary")
    model = FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint, summary_interval=48)
    model.save_pretrained(path)
    FastLongSpeechProcessor.from_pretrained(checkpoint).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("asked") / "set"
    path.mkdir()
    rows = []
    for number, seconds in enumerate((4.0, 2.5)):
        soundfile.write(path / f"{number}.wav", speech(seconds, seed=number), RATE)
        for question in ("Who?", "Where does she live?"):
            rows.append({"audio": f"{number}.wav", "question": question, "answer": "Anna", "kind": "name"})
    rows.append({"audio": "1.wav", "question": "A man or a woman?", "answer": "man", "kind": "voice"})
    return write_rows(path / "qa.jsonl", rows)


def test_evaluate_answers_as_the_model_does(folder, questions, tmp_path, capsys):
    options = ["--compression", "summary", "--compression-ratio", 4, "--target-length", 375, "--max-new-tokens", 5]
    command = ["evaluate", "--task", "qa", "--data", questions, "--model", folder, "--output", tmp_path / "out"]
    assert cli.main([str(word) for word in (*command, *options)]) == 0
    capsys.readouterr()
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    model = FastLongSpeechForConditionalGeneration.from_pretrained(folder).eval()
    processor = FastLongSpeechProcessor.from_pretrained(folder)
    for row in rows:
        turn = {"role": "user", "content": [{"type": "audio", "path": row["recording"]}]}
        turn["content"].append({"type": "text", "text": row["question"]})
        sizes = {"compression": "summary", "target_length": 375}
        inputs = processor.apply_chat_template(
            [turn], add_generation_prompt=True, tokenize=True, return_dict=True, **sizes
        )
        options = {"max_new_tokens": 5, "do_sample": False}
        ids = model.generate(**inputs, **sizes, compression_ratio=4, **options)[0, inputs["input_ids"].shape[1] :]
        assert row["prediction"] == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["run"]["compression_ratio"] == 4


def test_a_session_takes_the_length_of_30_seconds(folder, questions):
    session = Session(folder, max_new_tokens=5)
    session.model.config.compression = "summary"
    heard = session.listen(questions.parent / "0.wav")
    assert session.tokens(heard) == [100] and session.tokens(heard, 300) == [40]
    answers = {length: session.ask(heard, "Who?", length).text for length in (None, 300)}
    turn = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Who?"}]}
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "recordings": heard.encoded}
    inputs = session.processor.apply_chat_template([turn], **options)
    for length, text in answers.items():
        ids = session.model.generate(
            **inputs, recordings=heard.encoded, target_length=length, max_new_tokens=5, do_sample=False
        )[0, inputs["input_ids"].shape[1] :]
        assert session.processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_a_ratio_is_for_summaries(capsys):
    for options in (["--compression", "none", "--compression-ratio", "4"], ["--compression-ratio", "0"]):
        with pytest.raises(SystemExit):
            cli.main(["evaluate", "--task", "qa", "--data", "x", "--model", "y", "--output", "z", *options])
    said = capsys.readouterr().err
    assert "--compression-ratio has no meaning with --compression none; leave it out" in said
    assert "--compression-ratio must be 1 or more, got 0" in said


def test_methods_are_compared_at_equal_tokens_and_at_equal_operations(folder, checkpoint, questions, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("# Page\n")
    (tmp_path / "later").symlink_to(folder)  # a model that has learnt longer, say
    command = [folder, tmp_path / "later", "--data", questions, "--rivals", checkpoint, "--ratios", 2, "--limit", 1]
    words = [str(word) for word in (*command, "--output", tmp_path / "out", "--docs", page)]
    speech_xl.main(words)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    models = {folder.name, "later"}
    assert {row["method"] for row in results if row["model"]} == {"Speech-XL", "both", "every frame"}
    assert {row["model"] for row in results} == {"", *models}
    frames = results[0]["frames"]
    assert frames == 100 and all((row["recordings"], row["questions"]) == (1, 2) for row in results)
    taken = {(row["method"], row["ratio"], row["model"], row["like"]): row for row in results}
    every = taken["every frame", 1, "", ""]
    for (method, ratio, model, like), row in taken.items():
        if not like:
            assert abs(row["tokens"] - frames / ratio) <= 2
            continue
        as_much = taken[like, ratio, folder.name, ""]["operations"]
        assert method in speech_xl.RIVALS and not model
        # as many frames as it can pay for
        assert row["operations"] <= as_much and (row["tokens"] == frames or row["operations"] > 0.97 * as_much)
        assert row["operations"] <= every["operations"]
    assert sum(row["tokens"] == frames for row in results if row["like"]) >= 3
    costs = [taken[name, 2, folder.name, ""]["operations"] for name in ("both", "Speech-XL")]
    assert (
        taken["iterative fusion", 2, "", ""]["operations"] < costs[0] < costs[1]
    )  # fused first, there is less to read
    text = page.read_text()
    assert f"| ratio | Speech-XL ({folder.name}) | Speech-XL (later) | both ({folder.name}) | both (later) |" in text
    assert f"| method and ratio | operations | frames | {folder.name} | later | iterative fusion |" in text
    assert "| 2 | 0% (0% to 0%)" in text and (tmp_path / "page.svg").exists()

    answers = (tmp_path / "out" / "answers.jsonl").read_bytes()
    capsys.readouterr()
    speech_xl.main(words)  # asks nothing again
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == answers


def test_a_comparison_is_refused_where_its_columns_would_not_differ(folder, questions, tmp_path, capsys):
    command = ["--data", str(questions), "--output", str(tmp_path / "out")]
    for more, said in (
        ([folder, folder], "models must have folders of different names"),
        ([folder, "--ratios", "1"], "--ratios must be 2 or more, got 1"),
    ):
        with pytest.raises(SystemExit):
            speech_xl.main([*map(str, more), *command])
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# AudioMarathon


def marathon(tmp_path: Path, rows: object) -> Path:
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE), RATE)
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(rows))
    return path


def test_audio_marathons_choices_are_letters(tmp_path):
    choices = {"choice_a": "Anna", "choice_b": "Ben", "choice_c": "Cleo", "choice_d": "Dan"}
    row = {"path": "a.wav", "question": "Who?", **choices, "answer_gt": "B", "task_name": "SER", "uniq_id": 7}
    (example,) = load_questions("audio-marathon", marathon(tmp_path, [row])).examples
    assert example.question.startswith("Who?\n\nA. Anna\nB. Ben\nC. Cleo\nD. Dan\n\nPlease listen")
    assert example.question.endswith("only the letter (A, B, C, or D).")
    assert (example.answers, example.choices) == (["B"], ["A", "B", "C", "D"])
    assert example.notes == {"uniq_id": 7, "task_name": "SER"}


def test_audio_marathons_race_and_desed_have_forms_of_their_own(tmp_path):
    row = {"audio_path": "a.wav", "question": "Why?", "options": ["one", "two", "three"], "answer": "C"}
    (example,) = load_questions("audio-marathon", marathon(tmp_path, [row])).examples
    assert "Question: Why?\n\nOptions:\nA. one\nB. two\nC. three\n\n" in example.question
    assert example.question.endswith("the correct option (A, B, or C).") and example.answers == ["C"]
    row = {"path": "a.wav", "question": "What?", "choices": {"A": "dog", "B": "car"}, "answer_gt": "car"}
    (example,) = load_questions("audio-marathon", marathon(tmp_path, {"tasks": [row]})).examples
    assert example.answers == ["B"] and "A. dog\nB. car" in example.question
    with pytest.raises(ValueError, match="row 0 has the question None"):
        load_questions("audio-marathon", marathon(tmp_path, [{"path": "a.wav", "answer_gt": "A"}]))


def test_audio_marathons_had_names_the_right_choice(tmp_path):
    question = "Is this audio authentic or does it contain artificially synthesized (fake) segments?"
    row = {"path": "a.wav", "question": question, "choice_a": "Real", "choice_b": "Fake", "category": "fake"}
    row |= {"task_name": "Audio_Authenticity_Classification", "dataset_name": "HAD", "duration_seconds": 1.0}
    rows = [row | {"answer_gt": answer, "uniq_id": number} for number, answer in enumerate(("Fake", "real", "b"))]
    path = marathon(tmp_path, {"metadata": {"total_samples": 3}, "samples": rows})
    examples = load_questions("audio-marathon", path).examples
    assert [example.answers for example in examples] == [["B"], ["A"], ["B"]]
    assert examples[0].question.startswith(f"{question}\n\nA. Real\nB. Fake\n\nPlease listen")
    assert examples[0].question.endswith("only the letter (A or B).") and examples[0].choices == ["A", "B"]


def test_macro_f1_is_that_of_scikit_learn():
    answers = ["A", "B", "B", "C", "A", "D"]
    chosen = ["A", "B", "C", "C", "D", "D"]
    assert macro_f1(chosen, answers) == pytest.approx(f1_score(answers, chosen, average="macro"))
    assert macro_f1([None, "A"], ["A", "A"]) == pytest.approx(2 / 3)
