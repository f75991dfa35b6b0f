"""The evaluation: benchmarks in their public forms, answers by every method, runs that go on where they were."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import jiwer
import numpy as np
import pytest
import soundfile
import torch

from fastlongspeech import FastLongSpeechConfig, FastLongSpeechProcessor
from fastlongspeech.app import cli
from fastlongspeech.app.session import Answer
from fastlongspeech.data.tasks import EMOTIONS, load_questions
from fastlongspeech.evaluation.answering import Answerer
from fastlongspeech.evaluation.journal import read_journal
from fastlongspeech.evaluation.run import make_batches
from fastlongspeech.evaluation.scoring import whisper_normalizer
from fastlongspeech.prompts_fastlongspeech import TRANSCRIBE

RATE = 16000


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture(scope="module")
def questions(clips: Path) -> Path:
    """Two questions about each of three recordings."""
    rows = [
        {"audio": f"{clip}.wav", "question": f"{word} is it?", "answer": "noise", "kind": word, "time": 0.5}
        for clip in range(3)
        for word in ("What", "Where")
    ]
    return write(clips / "qa.jsonl", rows)


def evaluate(output: Path, checkpoint: Path, *more: object, task: str = "qa") -> dict[str, Any]:
    """The summary of a run on the CPU with answers of six tokens."""
    command = ["evaluate", "--task", task, "--model", checkpoint, "--output", output, "--device", "cpu"]
    command += ["--max-new-tokens", 6, *more]
    assert cli.main([str(word) for word in command]) == 0
    return json.loads((output / "summary.json").read_text())


# Benchmarks


def test_a_manifest_gives_questions_with_what_is_said_of_them(clips, questions):
    benchmark = load_questions("qa", questions)
    assert benchmark.metric == "answer" and len(benchmark.examples) == 6
    first, second = benchmark.examples[:2]
    assert (first.question, first.answers, first.duration) == ("What is it?", ["noise"], 31)
    assert first.notes == {"kind": "What", "time": 0.5}
    assert first.recording == second.recording
    assert benchmark.audio(first) == str(clips / "0.wav")


def test_shorter_and_longer_recordings_are_left_out_and_counted(checkpoint, questions, tmp_path):
    summary = evaluate(tmp_path / "out", checkpoint, "--data", questions, "--min-seconds", 1.5, "--max-seconds", 30)
    assert (summary["questions"], summary["rows_left_out"]) == (2, 4)
    assert [row["row"] for row in read_journal(tmp_path / "out/predictions.jsonl")] == [4, 5]
    with pytest.raises(ValueError, match="no recording of 40 to inf s"):
        load_questions("qa", questions, min_seconds=40)


def test_a_dataset_of_the_hub_is_loaded_by_name_subset_and_split(clips, monkeypatch):
    rows = [{"file": "x.flac", "audio": str(clips / "1.wav"), "text": "HELLO", "speaker_id": 3}]
    table = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio())
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or table)
    (example,) = load_questions("asr", "openslr/librispeech_asr#test", "clean").examples
    assert asked == [(("openslr/librispeech_asr", "clean"), {"split": "test"})]
    assert (example.answers, example.question) == (["HELLO"], TRANSCRIBE)

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(
        ValueError, match="openslr/none is no file or folder, and can't be loaded from the Hub: offline"
    ):
        load_questions("asr", "openslr/none")


@pytest.mark.parametrize("answer", ["noise", ["noise", "a noise"]])
def test_longspeech_eval_is_a_datasets_folder(checkpoint, clips, tmp_path, answer):
    rows = [{"audio": str(clips / "1.wav"), "question": "What?", "answer": answer} for _ in range(2)]
    table = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "set")
    source = f"{tmp_path / 'set'}#test"
    assert evaluate(tmp_path / "out", checkpoint, "--data", source, task="longspeech-eval")["recordings"] == 1
    benchmark = load_questions("longspeech-eval", source, limit=1)
    (example,) = benchmark.examples
    assert example.answers == ([answer] if isinstance(answer, str) else answer)
    assert benchmark.audio(example)["bytes"] == (clips / "1.wav").read_bytes()


def test_air_bench_names_recordings_by_task_and_dataset(clips, tmp_path):
    folder = tmp_path / "speech_QA_iemocap"
    folder.mkdir()
    (folder / "a.wav").write_bytes((clips / "1.wav").read_bytes())
    row = {"path": "a.wav", "question": "Who?", "answer_gt": "a man", "uniq_id": 7, "meta_info": "..."}
    rows = [row | {"task_name": "speech_QA", "dataset_name": "iemocap"}]
    rows += [row | {"task_name": "sound_QA", "dataset_name": "clotho"}]
    source = write(tmp_path / "Chat_meta.json", rows)
    (example,) = load_questions("air-bench", source, "speech_QA_iemocap").examples
    assert (example.question, example.answers, example.notes["uniq_id"]) == ("Who?", ["a man"], 7)
    with pytest.raises(ValueError, match="no rows of speech_dialogue_QA_fisher"):
        load_questions("air-bench", source, "speech_dialogue_QA_fisher")


def test_audio_root_comes_before_the_manifest_s_own_folder(clips, tmp_path):
    manifest = write(tmp_path / "set/qa.jsonl", [{"audio": "0.wav", "question": "Who?", "answer": "he"}])
    soundfile.write(tmp_path / "set/0.wav", np.zeros(RATE), RATE)
    assert [load_questions("qa", manifest, audio_root=root).examples[0].duration for root in (None, clips)] == [1, 31]
    rows = [{"audio": str(clips / "0.wav"), "question": "Who?", "answer": "he"}]
    datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False)).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match="holds its recordings itself; leave it out"):
        load_questions("qa", tmp_path / "d", audio_root=clips)


def test_librisqa_finds_flac_files_and_reads_both_parts(clips, tmp_path):
    recording = tmp_path / "LibriSpeech" / "test-clean" / "61" / "61-0.flac"
    recording.parent.mkdir(parents=True)
    soundfile.write(recording, soundfile.read(clips / "1.wav")[0], RATE)
    row = {"speech_path": "LibriSpeech/test-clean/61/61-0.wav", "duration": 1.0, "text": "HELLO"}
    first = write(tmp_path / "I.json", [row | {"question": "Who?", "answer": "He."}])
    benchmark = load_questions("librisqa", first, audio_root=tmp_path / "LibriSpeech")
    assert benchmark.metric == "answer" and benchmark.audio(benchmark.examples[0]) == str(recording)
    second = write(tmp_path / "II.json", [row | {"question_and_option": "Who? A. He B. She", "answer": "B"}])
    benchmark = load_questions("librisqa", second)
    assert benchmark.metric == "choice" and benchmark.examples[0].choices == ["A", "B", "C", "D"]


def test_openasqa_finds_recordings_of_another_machine(clips, tmp_path):
    row = {"audio_id": "/data/sls/LibriTTS/1.wav", "instruction": "Who?", "input": "", "output": "A man.", "task": "t"}
    source = write(tmp_path / "openasqa.json", [row | {"dataset": "libritts"}])
    benchmark = load_questions("openasqa", source, audio_root=clips)
    assert benchmark.audio(benchmark.examples[0]) == str(clips / "1.wav")
    assert benchmark.examples[0].answers == ["A man."]


def test_meld_asks_for_the_emotion(clips, tmp_path):
    (tmp_path / "dia0_utt3.wav").write_bytes((clips / "1.wav").read_bytes())
    source = tmp_path / "test_sent_emo.csv"
    source.write_text("Sr No.,Utterance,Emotion,Dialogue_ID,Utterance_ID\n1,Oh!,surprise,0,3\n")
    (example,) = load_questions("meld", source).examples
    assert example.answers == ["Surprise"] and example.choices == EMOTIONS
    assert "[Anger, Disgust, Fear, Joy, Neutral, Sadness, Surprise]" in example.question


@pytest.mark.parametrize(
    ("task", "row", "fault"),
    [
        ("qa", {"question": "Who?", "answer": ""}, "line 1 has the answer ''"),
        ("qa", {"answer": "he"}, "line 1 has the question None"),
        ("choice", {"question": "Who?", "answer": "he", "choices": ["she", "it"]}, "which is none of its choices"),
        ("choice", {"question": "Who?", "answer": "he"}, "choices None"),
        ("qa", {"audio": "none.wav", "question": "Who?", "answer": "he"}, "none.wav, which does not exist"),
    ],
)
def test_bad_rows_are_named(clips, task, row, fault):
    source = write(clips / "bad.jsonl", [{"audio": "1.wav"} | row])
    with pytest.raises(ValueError, match=fault):
        load_questions(task, source)


# Runs


def test_batches_answer_as_one_by_one(checkpoint, questions, tmp_path):
    options = ["--data", questions, "--target-length", 15]
    alone = evaluate(tmp_path / "alone", checkpoint, *options, "--batch-size", 1)
    together = evaluate(tmp_path / "together", checkpoint, *options, "--batch-size", 4)
    assert read_journal(tmp_path / "alone/predictions.jsonl") == read_journal(tmp_path / "together/predictions.jsonl")
    assert alone["scores"] == together["scores"]
    assert alone["questions"] == 6 and alone["recordings"] == 3
    assert alone["hours"] == round(34 / 3600, 4)
    assert alone["scores_by_kind"].keys() == {"What", "Where"}
    assert alone["run"]["target_length"] == 15 and alone["versions"]["torch"] == torch.__version__


def test_the_questions_about_a_recording_share_a_batch(questions):
    examples = load_questions("qa", questions).examples
    assert [[example.row for example in batch] for batch in make_batches(examples[::-1], 3)] == [
        [1, 0],
        [5, 4],
        [3, 2],
    ]
    assert [len(batch) for batch in make_batches(examples, 5)] == [4, 2]
    assert [len(batch) for batch in make_batches(examples, 1)] == [1] * 6


def test_a_run_that_was_stopped_goes_on(checkpoint, questions, tmp_path, monkeypatch, capsys):
    options = ["--data", questions, "--batch-size", 2]
    whole = evaluate(tmp_path / "whole", checkpoint, *options)
    inner, asked = Answerer.answer, []

    def answer(self, texts, *more):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(texts)
        return inner(self, texts, *more)

    monkeypatch.setattr(Answerer, "answer", answer)
    command = ["evaluate", "--task", "qa", "--model", checkpoint, "--output", tmp_path / "cut", "--device", "cpu"]
    command = [str(word) for word in [*command, "--max-new-tokens", 6, *options]]
    assert cli.main(command) == 130
    assert len(read_journal(tmp_path / "cut/predictions.part0.jsonl")) == 4
    asked.clear()
    again = evaluate(tmp_path / "cut", checkpoint, *options)
    assert len(asked) == 1 and again["scores"] == whole["scores"]
    assert not list((tmp_path / "cut").glob("*.part*"))
    assert cli.main([*command, "--compression", "none"]) == 1
    assert "compression 'iterative_fusion', not 'none'; name another one" in capsys.readouterr().err


def test_transcripts_by_the_language_model_and_by_the_ctc_decoder(checkpoint, clips, tmp_path):
    rows = [
        {"audio": f"{number}.wav", "text": text} for number, text in enumerate(["the cat sat", "a hill", "<MUSIC>"])
    ]
    data = write(clips / "asr.jsonl", rows)
    by_llm = evaluate(tmp_path / "llm", checkpoint, "--data", data, task="asr")
    by_ctc = evaluate(tmp_path / "ctc", checkpoint, "--data", data, "--compression", "ctc", task="asr")
    assert by_llm["references_without_words"] == by_ctc["references_without_words"] == 1
    predictions = read_journal(tmp_path / "ctc/predictions.jsonl")
    normalize = whisper_normalizer()
    pairs = [(normalize(row["answers"][0]), normalize(row["prediction"])) for row in predictions[:2]]
    assert by_ctc["scores"]["word_error_rate"]["value"] == pytest.approx(
        jiwer.wer(*map(list, zip(*pairs, strict=True)))
    )


def test_choices_are_scored_by_accuracy(checkpoint, clips, tmp_path, monkeypatch):
    rows = [
        {"audio": "1.wav", "question": "Who?", "answer": word, "choices": ["man", "woman"]}
        for word in ("man", "woman")
    ]
    monkeypatch.setattr(Answerer, "answer", lambda self, texts, *more: [Answer("A man.", True), Answer("both", False)])
    summary = evaluate(tmp_path / "out", checkpoint, "--data", write(clips / "choice.jsonl", rows), task="choice")
    assert summary["scores"]["accuracy"]["value"] == 0.5
    assert summary["without_a_choice"] == 1 and summary["stopped_by_max_new_tokens"] == 1


@pytest.mark.parametrize("method", ["random", "average_pooling", "none", "cascade", "ctc_cascade", "ntk_rope"])
def test_every_method_answers(checkpoint, questions, tmp_path, method, monkeypatch):
    monkeypatch.setattr("fastlongspeech.evaluation.answering.TRANSCRIPT_TOKENS", 4)
    summary = evaluate(tmp_path / "out", checkpoint, "--data", questions, "--compression", method, "--limit", 2)
    assert summary["questions"] == 2


def test_ntk_rope_keeps_every_frame_that_fits(checkpoint, questions, tmp_path, monkeypatch):
    made = []
    inner = Answerer.prepare
    monkeypatch.setattr(Answerer, "prepare", lambda self, *rest: inner(self, *rest) or made.append(self))
    evaluate(tmp_path / "out", checkpoint, "--data", questions, "--compression", "ntk_rope", "--limit", 1)
    config = FastLongSpeechConfig.from_pretrained(checkpoint)
    (answerer,) = made
    assert answerer.model.config.get_text_config().rope_parameters["rope_theta"] > 10000
    prompt = answerer.processor.tokenizer(answerer_prompt(answerer.processor)).input_ids
    assert answerer.target_length == config.get_text_config().max_position_embeddings - len(prompt) - 6


def answerer_prompt(processor: FastLongSpeechProcessor) -> str:
    turn = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What is it?"}]}]
    return processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


def test_arguments_without_meaning_are_refused(capsys):
    for options, message in [
        (["--task", "qa", "--compression", "none", "--target-length", "5"], "--target-length has no meaning"),
        (["--task", "qa", "--compression", "ctc"], "--compression ctc is for --task asr"),
        (["--task", "asr", "--compression", "cascade"], "--compression cascade is not for --task asr"),
        (["--task", "qa", "--cascade-prompt", "{transcript} {question}"], "--cascade-prompt has no meaning with"),
        (["--task", "qa", "--compression", "cascade", "--cascade-prompt", "{question}"], "must hold {transcript}"),
        (["--task", "qa", "--batch-size", "0"], "--batch-size must be 1 or more"),
    ]:
        with pytest.raises(SystemExit):
            cli.main(["evaluate", "--data", "x", "--model", "y", "--output", "z", *options])
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_processes_share_the_questions(checkpoint, questions, tmp_path):
    alone = evaluate(tmp_path / "one", checkpoint, "--data", questions, "--batch-size", 1)
    # Without --multi_gpu a machine that has none starts one process.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "fastlongspeech", "evaluate", "--task", "qa", "--data", questions, "--model", checkpoint]
    command += ["--output", tmp_path / "two", "--device", "cpu", "--max-new-tokens", 6, "--batch-size", 1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([str(word) for word in command], check=True, env=environment, timeout=300)
    summary = json.loads((tmp_path / "two/summary.json").read_text())
    assert summary["scores"] == alone["scores"] and summary["run"]["processes"] == 2
    assert read_journal(tmp_path / "two/predictions.jsonl") == read_journal(tmp_path / "one/predictions.jsonl")
