"""A session listens once and then answers any number of questions, as the documented calls do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RATE, speech

from fastlongspeech import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from fastlongspeech.app.session import Recording, Session

QUESTIONS = ("Where does Anna live?", "And Helen?")


@pytest.fixture(scope="module")
def session(checkpoint: Path) -> Session:
    return Session(checkpoint, max_new_tokens=8)


@pytest.fixture(scope="module")
def samples() -> list[np.ndarray]:
    """31 s, two windows, and 2 s."""
    return [speech(31.0), speech(2.0, seed=1)]


def answer(session: Session, recordings: list[np.ndarray], question: str, length: int = 750) -> str:
    """The greedy answer by processor and `generate`, 8 tokens long, all at once."""
    parts: list[dict[str, Any]] = [{"type": "audio", "audio": samples} for samples in recordings]
    inputs = session.processor.apply_chat_template(
        [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        target_length=length,
        sampling_rate=RATE,
    )
    ids = session.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return session.processor.decode(ids, skip_special_tokens=True).strip()


def test_what_is_known_of_recordings(session, samples, wav):
    heard = session.listen([{"array": samples[0], "sampling_rate": RATE}, wav])
    assert heard.recordings == (Recording("dict", 31.0, 2, 775), Recording(str(wav), 1.5, 1, 37))
    assert session.tokens(heard, 50) == [50, 37]
    with pytest.raises(ValueError, match="target_length must be a positive integer, got 0"):
        session.tokens(heard, 0)


def test_questions_need_the_encoder_once(session, samples):
    calls = []
    hook = session.model.get_encoder("audio").register_forward_hook(lambda *_: calls.append(1))
    heard = session.listen([{"array": array, "sampling_rate": RATE} for array in samples])
    listened = len(calls)
    assert listened > 0
    for question in QUESTIONS:
        for length in (750, 20):
            assert session.ask(heard, question, length).text == answer(session, samples, question, length)
            del calls[listened:]  # of the answer all at once
    assert [session.ask(heard, question).text for question in QUESTIONS] and len(calls) == listened
    hook.remove()


def test_an_answer_is_said_as_it_comes(session, samples):
    heard = session.listen([{"array": samples[1], "sampling_rate": RATE}])
    pieces: list[str] = []
    text, ended = session.ask(heard, QUESTIONS[0], say=pieces.append)
    assert "".join(pieces).strip() == text
    assert not ended


def test_the_ctc_decoder_reads_what_was_heard(session, samples):
    heard = session.listen([{"array": array, "sampling_rate": RATE} for array in samples])
    inputs = session.processor(audio=samples, sampling_rate=RATE)
    assert session.transcribe_by_ctc(heard) == session.processor.ctc_decode(session.model.ctc_transcribe(**inputs))


def test_it_holds_the_model_and_the_processor(session, checkpoint):
    assert type(session.model) is FastLongSpeechForConditionalGeneration and not session.model.training
    assert type(session.processor) is FastLongSpeechProcessor
    assert session.seconds["loading"] > 0
