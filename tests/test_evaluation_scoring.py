"""Scores of the evaluation: SQuAD's rules, choices, the corpus word error rate, intervals; and the journal."""

import jiwer
import numpy as np
import pytest

from fastlongspeech.evaluation.journal import Journal, read_journal
from fastlongspeech.evaluation.scoring import (
    exact_match,
    find_choice,
    mean_with_interval,
    token_f1,
    whisper_normalizer,
    word_errors,
)


def test_answers_are_compared_as_squad_does():
    assert exact_match("The  Cat!", ["dog", "cat"]) and not exact_match("cats", ["cat"])
    assert token_f1("the black cat", ["cat"]) == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert token_f1("a cat sat, sat", ["cat sat down", "dog"]) == pytest.approx(2 / 3)  # two of three shared
    assert token_f1("dog", ["cat"]) == 0
    assert token_f1("the", ["a"]) == 1  # both are empty then


@pytest.mark.parametrize(
    ("prediction", "choice"),
    [
        ("joy", "Joy"),
        ("The emotion is Sadness.", "Sadness"),
        ("Joy or sadness", None),
        ("happy", None),
        ("joyful", None),
    ],
)
def test_a_choice_is_the_only_one_named(prediction, choice):
    assert find_choice(prediction, ["Joy", "Sadness"]) == choice


def test_a_letter_is_chosen_where_the_answer_begins_with_it():
    assert find_choice("B. A man", ["A", "B"]) == "B"
    assert find_choice("It is a man", ["A", "B"]) is None


def test_word_error_rate_is_the_corpus_rate_of_jiwer():
    references = ["the cat sat on a hill", "a dog ran", "the mat"]
    transcripts = ["the cat sat hill", "a dog can run", ""]
    errors, words = zip(*map(word_errors, references, transcripts), strict=True)
    rate = mean_with_interval(errors, ["0", "1", "2"], words)
    assert rate["value"] == pytest.approx(jiwer.wer(references, transcripts))
    assert rate["low"] <= rate["value"] <= rate["high"]


def test_transcripts_are_normalized_as_whisper_does(tmp_path):
    assert (
        whisper_normalizer()("Mr. Smith's <COMMA> colour, twenty one!").split() == "mister smith is colour 21".split()
    )
    (tmp_path / "normalizer.json").write_text('{"colour": "color"}')
    assert whisper_normalizer(tmp_path / "normalizer.json")("Colour") == "color"


def test_the_interval_is_that_of_resampled_recordings():
    rng = np.random.default_rng(1)
    right = rng.random(400) < 0.3
    alone = mean_with_interval(right, [str(number) for number in range(400)])
    assert alone["value"] == right.mean()
    error = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 400)  # the normal approximation
    assert alone["low"] == pytest.approx(right.mean() - error, abs=0.01)
    assert alone["high"] == pytest.approx(right.mean() + error, abs=0.01)
    doubled = mean_with_interval(np.repeat(right, 2), [str(number // 2) for number in range(800)])
    assert doubled == pytest.approx(alone)  # asked twice about the same recording: nothing new
    assert mean_with_interval(right, ["0"] * 400)["low"] == right.mean()


def test_a_journal_survives_a_cut_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"text": "é\n"})
    path.write_bytes(path.read_bytes() + b'{"text": "cu')
    assert read_journal(path) == [{"text": "é\n"}]
    with Journal(path) as journal:
        journal.append({"text": "b"})
    assert [row["text"] for row in read_journal(path)] == ["é\n", "b"]


@pytest.mark.parametrize("line", ["some text", "[1]", "\xff"])
def test_a_journal_with_another_line_is_refused(line, tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=f"^line 2 of {path} is no JSON object; rename or remove the file, or name"):
        read_journal(path)
