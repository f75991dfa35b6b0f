"""Answers of the evaluation: by the frames of a recording or by its transcript, by every method."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastlongspeech import FastLongSpeechForConditionalGeneration
from fastlongspeech.app.session import Answer
from fastlongspeech.evaluation.answering import TRANSCRIPT_TOKENS, Answerer, answer_batch


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint).eval()


def test_answers_are_those_of_generate(checkpoint, model, clips, processor):
    questions = ["Who?", "What is it about?", "Where?"]
    names = ["0.wav", "1.wav", "0.wav"]
    answerer = Answerer(model, processor, "iterative_fusion", 20, max_new_tokens=6)
    answers = answerer.answer(questions, names, [clips / name for name in names])
    for question, name, answer in zip(questions, names, answers, strict=True):
        parts = [{"type": "audio", "path": str(clips / name)}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            target_length=20,
        )
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer.text == processor.decode(ids, skip_special_tokens=True).strip()
        assert answer.ended == (processor.tokenizer.eos_token_id in ids or len(ids) < 6)


def test_a_recording_is_heard_once_for_all_its_questions(model, clips, processor, monkeypatch):
    heard = []
    inner = model.encode
    monkeypatch.setattr(
        model,
        "encode",
        lambda **inputs: heard.append(inputs["windows_per_audio"].tolist()) or inner(**inputs),
    )
    answerer = Answerer(model, processor, "none", None, max_new_tokens=2)
    answerer.answer(["Who?", "What?", "Why?"], ["0", "0", "1"], [clips / "0.wav"] * 2 + [clips / "1.wav"])
    answerer.answer(["Where?", "When?"], ["1", "2"], [clips / "1.wav", clips / "2.wav"])
    assert heard == [[2, 1], [1]]


def test_kept_frames_serve_other_methods(model, clips, processor, monkeypatch):
    asked = ["Who?", "What?"], ["0", "1"], [clips / "0.wav", clips / "1.wav"]
    anew = [Answerer(model, processor, method, 9, 4).answer(*asked) for method in ("random", "cascade")]
    frames = {}
    Answerer(model, processor, "none", None, 4, frames=frames).answer(*asked)
    assert frames.keys() == {"0", "1"}
    monkeypatch.setattr(model, "encode", None)
    kept = [Answerer(model, processor, method, 9, 4, frames=frames).answer(*asked) for method in ("random", "cascade")]
    assert kept == anew


def note_what_is_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A list that rows and tokens of all that the language model reads from now on are put into."""
    read: list[tuple[int, int]] = []
    inner = model.model.language_model.forward

    def forward(*args: Any, **inputs: Any) -> Any:
        read.append(inputs["inputs_embeds"].shape[:2])
        return inner(*args, **inputs)

    monkeypatch.setattr(model.model.language_model, "forward", forward)
    return read


def test_what_questions_about_a_recording_begin_with_is_read_once(model, processor, monkeypatch):
    recordings = [torch.randn(frames, 16) for frames in (30, 12)]
    questions, heard = ["Who?", "What is it about?", "Where?"], [recordings[0], recordings[0], recordings[1]]
    one_by_one = [answer_batch(model, processor, [q], [h], 6)[0] for q, h in zip(questions, heard, strict=True)]
    read = note_what_is_read(model, monkeypatch)
    assert answer_batch(model, processor, questions, heard, 6) == one_by_one
    (recordings_read, _), (rows, tokens), *_ = read
    assert (recordings_read, rows) == (2, 3) and tokens <= len("What is it about?<|im_end|>\n<|im_start|>assistant\n")


def test_the_cascade_gives_the_transcript_of_every_window_as_text(model, clips, processor, monkeypatch):
    seen = []
    inner = processor.tokenizer.__class__.__call__
    monkeypatch.setattr(
        processor.tokenizer.__class__,
        "__call__",
        lambda self, text, **kw: seen.append(text) or inner(self, text, **kw),
    )
    heard, compress = [], model.compress
    monkeypatch.setattr(model, "compress", lambda *args: heard.append(args[0].lengths.tolist()) or compress(*args))
    monkeypatch.setattr("fastlongspeech.evaluation.answering.TRANSCRIPT_TOKENS", 4)
    answerer = Answerer(model, processor, "cascade", None, max_new_tokens=2)
    answerer.answer(["Who?"], ["0"], [clips / "0.wav"])
    windows, *_, (prompt,) = seen
    assert [window.count(processor.audio_token) for window in windows] == [1, 1] and heard == [[750, 25]]
    assert "Who?" in prompt and "transcript of a recording: " in prompt and processor.audio_token not in prompt


def test_an_answer_by_a_transcript_that_was_cut_has_not_ended(model, clips, processor, monkeypatch):
    limits = []

    def ask_all(_, processor, questions, heard, limit, names=()):
        limits.append(limit)
        return [Answer("text", limit == 2)] * len(questions)

    monkeypatch.setattr("fastlongspeech.evaluation.answering.answer_batch", ask_all)
    answerer = Answerer(model, processor, "cascade", None, max_new_tokens=2)
    assert answerer.answer(["Who?"], ["0"], [clips / "0.wav"]) == [Answer("text", False)]
    assert limits == [TRANSCRIPT_TOKENS, 2]


def test_a_transcript_beyond_the_context_is_refused(model, clips, processor, monkeypatch):
    monkeypatch.setattr(model, "ctc_transcribe", lambda **_: [[]])
    monkeypatch.setattr(processor, "ctc_decode", lambda _: ["a " * 50_000], raising=False)
    with pytest.raises(ValueError, match="leave out longer recordings with --max-seconds"):
        Answerer(model, processor, "ctc_cascade", None, 4).answer(["Who?"], ["1"], [clips / "1.wav"])


def test_other_braces_of_a_cascade_s_prompt_are_text(model, clips, processor, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "fastlongspeech.evaluation.answering.answer_batch",
        lambda model, processor, questions, *_: asked.extend(questions) or [Answer("", True)] * len(questions),
    )
    monkeypatch.setattr(processor, "ctc_decode", lambda _: ["{question}"], raising=False)
    prompt = 'As {"answer": ...}: {transcript} {question}'
    Answerer(model, processor, "ctc_cascade", None, 4, prompt).answer(["Who?"], ["1"], [clips / "1.wav"])
    assert asked == ['As {"answer": ...}: {question} Who?']


def test_the_ctc_cascade_gives_the_transcript_of_the_ctc_decoder(model, clips, processor):
    inputs = processor(audio=clips / "0.wav")
    transcript = processor.ctc_decode(model.ctc_transcribe(**inputs))[0]
    assert Answerer(model, processor, "ctc", None, 2).answer(["?"], ["0"], [clips / "0.wav"])[0].text == transcript
    for given, prompt in (
        (None, f"This is the transcript of a recording: {transcript}\n\nWho?"),
        ("{question} {transcript}", f"Who? {transcript}"),
    ):
        answerer = Answerer(model, processor, "ctc_cascade", None, 4, given)
        (answer,) = answerer.answer(["Who?"], ["0"], [clips / "0.wav"])
        assert answer.text == answer_batch(model, processor, [prompt], [None], 4)[0].text.strip()


def test_the_true_transcript_is_the_passage_of_the_row_and_read_once_for_its_questions(model, processor, monkeypatch):
    passages = ["Anna is here.", "Anna is here.", "Tom is there."]
    questions = ["Who?", "Where is she?", "Where?"]
    prompts = [f"{passage}\n{question}" for passage, question in zip(passages, questions, strict=True)]
    one_by_one = [answer_batch(model, processor, [prompt], [None], 4)[0].text.strip() for prompt in prompts]
    read = note_what_is_read(model, monkeypatch)
    answerer = Answerer(model, processor, "true_transcript", None, 4, "{transcript}\n{question}")
    found = answerer.answer(questions, ["0", "0", "1"], ["nobody reads it"] * 3, passages)
    assert [answer.text for answer in found] == one_by_one
    (transcripts, _), (rows, tokens), *_ = read
    assert (transcripts, rows) == (2, 3) and tokens < len(prompts[1])
    with pytest.raises(ValueError, match="column passage"):
        answerer.answer(["Who?"], ["2"], ["nobody reads it"], [None])


def test_vanilla_refuses_recordings_longer_than_a_window(model, processor):
    Answerer(model, processor, "vanilla", None, 2).prepare(["Who?"], [30.0])
    with pytest.raises(ValueError, match="1 rows have longer ones, up to 31.0 s"):
        Answerer(model, processor, "vanilla", None, 2).prepare(["Who?", "?"], [31.0, 2.0])
