"""LongSpeech's tasks from rows of their public form, and what their answers are scored by."""

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
from conftest import RATE, speech
from jiwer import cer, wer
from test_evaluation_chat import endpoint  # noqa: F401

from fastlongspeech.app import cli
from fastlongspeech.data.tasks import LONGSPEECH, load_questions
from fastlongspeech.evaluation import longspeech
from fastlongspeech.evaluation.scoring import whisper_normalizer

AUDIO = "LongSpeech_p1/wavs/part_00/000000.wav"
PROMPT = "Detect the language and recognize the speech: <|en|>"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The data set's folder, with one recording in it."""
    (tmp_path / AUDIO).parent.mkdir(parents=True)
    soundfile.write(tmp_path / AUDIO, speech(2.0), RATE)
    return tmp_path


def row(task: str, answer: str, prompt: str = PROMPT, language: str = "en") -> dict[str, Any]:
    user = {"role": "user", "audio": AUDIO, "content": prompt}
    return {"language": language, "task": task, "messages": [user, {"role": "assistant", "content": answer}]}


def write(root: Path, task: str, *rows: dict[str, Any]) -> Path:
    path = root / "LongSpeechQA" / task / "test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def figures(task: str, *pairs: tuple[str, ...]) -> dict[str, Any]:
    """The figures of answers: what was said, the reference and perhaps the language."""
    rows = []
    for number, (said, reference, *language) in enumerate(pairs):
        one = {"prediction": said, "answers": [reference], "recording": str(number), "language": "".join(language)}
        rows.append(one | longspeech.score_prediction(task, one, whisper_normalizer()))
    return longspeech.figures(task, rows)


def values(found: dict[str, Any]) -> dict[str, float]:
    return {name: figure["value"] for name, figure in found.items()}


def test_a_row_is_its_user_s_prompt_about_its_recording(root):
    path = write(root, "ASR", row("ASR", "hello there"), row("ASR", "guten Tag", language="de"))
    benchmark = load_questions("longspeech", path, audio_root=root)
    assert benchmark.metric == "ASR"
    first, second = benchmark.examples
    assert (first.question, first.answers, first.choices) == (PROMPT, ["hello there"], [])
    assert first.recording == str(root / AUDIO) == second.recording
    assert second.notes == {"task": "ASR", "language": "de"}


def test_rows_of_other_forms_and_tasks_are_refused(root):
    rows = [row("ASR", "x"), row("summary", "x")]
    with pytest.raises(ValueError, match="has rows of the task ASR, summary; give a file of one of LongSpeech's"):
        load_questions("longspeech", write(root, "ASR", *rows), audio_root=root)
    with pytest.raises(ValueError, match="has rows of the task music; give a file of one of LongSpeech's: ASR, "):
        load_questions("longspeech", write(root, "music", row("music", "x")), audio_root=root)
    for number, messages in enumerate(([row("summary", "x")["messages"][0]], "talk", ["a", "b"], None)):
        broken = write(root / str(number), "summary", row("summary", "x") | {"messages": messages})
        with pytest.raises(ValueError, match="line 1 has 'audio' = None; it must be the path of one recording"):
            load_questions("longspeech", broken, audio_root=root)


@pytest.mark.parametrize("task", ["ASR", pytest.param("emotionQA", marks=pytest.mark.slow)])
def test_a_task_is_evaluated_by_name(checkpoint, root, task):
    path = write(root, task, row(task, "calm"), row(task, "serious"))
    command = ["evaluate", "--task", "longspeech", "--data", path, "--audio-root", root, "--model", checkpoint]
    command += ["--device", "cpu", "--max-new-tokens", 3, "--output", root / "out"]
    assert cli.main([str(word) for word in command]) == 0
    scores = json.loads((root / "out" / "summary.json").read_text())["scores"]
    assert ("character_error_rate" if task == "ASR" else "strict_accuracy") in scores


def test_transcripts_have_words_but_for_chinese_japanese_and_korean():
    pairs = [("the cat sat", "the cat sad", "en"), ("你好世", "你好世界", "zh-CN"), ("Guten Tag!", "guten Tag", "de")]
    found = values(figures("ASR", *pairs))
    assert found["word_error_rate"] == pytest.approx(wer("the cat sad guten tag", "the cat sat guten tag"))
    assert found["cjk_character_error_rate"] == pytest.approx(cer("你好世界", "你好世")) == 0.25
    assert found["character_error_rate"] == pytest.approx(2 / (9 + 4 + 8))
    assert set(values(figures("ASR", pairs[1]))) == {"cjk_character_error_rate", "character_error_rate"}


def test_translations_have_the_mean_of_their_languages_bleu():
    german = "die Katze sitzt heute auf der Matte"
    found = figures("translation", (german.upper(), german, "de"), ("一二三四五", "一二三四五", "zh-CN"))["bleu"]
    assert found["by_language"] == {"de": pytest.approx(100), "zh": pytest.approx(100)}
    # One word of eight is wrong: 7/8, 5/7, 3/6 and 2/5 of its n-grams are right.
    said = "a b c d e f g h".replace("c", "x")
    expected = 100 * (7 / 8 * 5 / 7 * 3 / 6 * 2 / 5) ** 0.25
    assert values(figures("translation", (said, "a b c d e f g h", "en")))["bleu"] == pytest.approx(expected)


def test_summaries_have_rouge():
    found = values(figures("summary", ("the cat sat", "the cat sleeps here")))
    assert found == {
        name: pytest.approx(share) for name, share in (("rouge1", 4 / 7), ("rouge2", 0.4), ("rougeL", 4 / 7))
    }


def test_numbers_are_right_wrong_or_none():
    said = [("There are 3 speakers.", "3"), ("Two.", "2"), ("4", "5"), ("many", "2")]
    found = values(figures("speaker_count", *said))
    assert found == {"numeric_accuracy": 0.5, "parsability_rate": 0.75, "post_parsing_precision": pytest.approx(2 / 3)}
    assert values(figures("content_separation", ("none", "2"))) == {"numeric_accuracy": 0, "parsability_rate": 0}
    assert longspeech.find_number("someone") is None and longspeech.find_number("one of 12") == 12


def test_languages_are_right_others_or_none():
    pairs = [("It is English.", "English"), ("<|de|>", "German"), ("French", "German"), ("I can't tell it", "Italian")]
    found = values(figures("language_detection", *pairs))
    assert found == {"detection_accuracy": 0.5, "misunderstanding_rate": 0.25, "detection_errors": 0.25}
    assert longspeech.find_language("Mandarin Chinese") == longspeech.find_language("zh") == "zh"
    assert longspeech.find_language("English or French") is None
    assert values(figures("language_detection", ("Korean", "?", "ko")))["detection_accuracy"] == 1


def test_emotions_are_compared_by_kind_and_by_polarity():
    pairs = [
        ("Excited", "Amused"),  # the same kind
        ("It sounds hopeful.", "Excited"),  # the same polarity
        ("Positive - Uplifting", "awe"),
        ("calm", "Serious"),
        ("calm and serious", "calm"),  # no single kind
    ]
    assert values(figures("emotionQA", *pairs)) == {
        "strict_accuracy": 0.4,
        "relaxed_accuracy": pytest.approx(0.6),
        "parsability_rate": 0.8,
    }


def test_every_task_has_figures():
    for task in LONGSPEECH:
        assert figures(task, ("one calm English word", "one calm English word", "en")), task


def test_a_judge_says_what_is_right_in_part(endpoint, checkpoint, root, monkeypatch):  # noqa: F811
    rows = [row(longspeech.TEMPORAL, "after the talk", prompt) for prompt in ("When?", "Where?", "Who?", "Why?")]
    path = write(root, longspeech.TEMPORAL, *rows)
    verdicts = {"When?": '{"score": 5}', "Where?": '{"score": 3}', "Who?": '{"score": 1}', "Why?": "perhaps"}
    endpoint.reply = lambda prompt: next(
        reply for asked, reply in verdicts.items() if f"Question: {asked}\nReference answer: after the talk" in prompt
    )
    monkeypatch.setenv("OPENAI_API_KEY", "s3cr3t")
    command = ["evaluate", "--task", "longspeech", "--data", path, "--audio-root", root, "--model", checkpoint]
    command += ["--device", "cpu", "--max-new-tokens", 3, "--output", root / "out"]
    command += ["--judge", "--judge-model", "m", "--judge-url", endpoint.url]
    assert cli.main([str(word) for word in command]) == 0
    summary = json.loads((root / "out" / "summary.json").read_text())
    assert summary["scores"]["strict_accuracy"]["value"] == pytest.approx(1 / 3)
    assert summary["scores"]["relaxed_accuracy"]["value"] == pytest.approx(2 / 3)
    assert summary["unparsable_verdicts"] == 1
