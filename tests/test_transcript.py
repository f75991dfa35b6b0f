"""A transcript of any duration is cut at pauses, checked window by window, and says what it covers."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import RATE, speech

from fastlongspeech.app import transcript
from fastlongspeech.app.session import Answer, Session
from fastlongspeech.app.transcript import (
    StopAtLoop,
    Window,
    cover,
    cut_at_pauses,
    find_pause,
    loops,
    read_windows,
    transcribe,
)
from fastlongspeech.app.words import Word


@pytest.fixture(scope="module")
def session(checkpoint: Path) -> Session:
    return Session(checkpoint, max_new_tokens=8)


def test_the_longest_pause_of_the_second_half_is_cut_in_its_middle():
    density = torch.ones(100)
    density[10:40] = 0.0  # longer, but in the first half
    density[60:64] = 0.2
    density[80:90] = 0.49
    density[95:97] = 0.0
    assert find_pause(density) == 85
    assert find_pause(torch.ones(100)) == 100
    assert find_pause(torch.zeros(100)) == 75


def test_windows_follow_each_other_without_a_gap_and_begin_at_pauses(session, monkeypatch):
    """Of a recording with pauses from 22 to 23 s and from 47 to 48 s, by a density that knows them."""
    place = itertools.count(0)  # windows are asked about in order
    starts = {0: 0.0, 1: 22.52}

    def density(frames):
        seconds = starts[next(place)] + torch.arange(len(frames)) * 0.04
        quiet = ((seconds >= 22) & (seconds < 23)) | ((seconds >= 47) & (seconds < 48))
        return 1.0 - quiet.float()

    monkeypatch.setattr(session.model, "density", density)
    windows = list(read_windows(session, speech(60.0)))
    ends = [(float(window.starts[0]), float(window.ends[-1])) for window in windows]
    assert ends == [(0.0, pytest.approx(22.52)), (pytest.approx(22.52), pytest.approx(47.52)), (47.52, 60.0)]
    # Each window is what the encoder makes of its samples alone.
    alone = session.listen(speech(60.0)[round(47.52 * RATE) :]).encoded.frames
    torch.testing.assert_close(windows[2].frames, alone)


def test_windows_go_on_where_an_earlier_run_stopped(session, monkeypatch):
    monkeypatch.setattr(session.model, "density", lambda frames: torch.zeros(len(frames)))
    samples = speech(70.0)
    whole = list(read_windows(session, samples))
    rest = list(read_windows(session, samples, start=float(whole[0].ends[-1])))
    assert len(rest) == len(whole) - 1 > 1
    for again, before in zip(rest, whole[1:], strict=True):
        assert torch.equal(again.frames, before.frames) and torch.equal(again.starts, before.starts)


@pytest.mark.parametrize("seconds, ends", [(60.0, [30.0, 60.0]), (30.02, [30.0]), (1.0, [1.0])])
def test_without_pauses_windows_are_whole_and_a_rest_without_a_frame_is_none(session, monkeypatch, seconds, ends):
    monkeypatch.setattr(session.model, "density", lambda frames: torch.ones(len(frames)))
    samples = speech(seconds)
    assert [float(window.ends[-1]) for window in read_windows(session, samples)] == ends
    encoded = session.listen(samples).encoded
    assert [float(window.ends[-1]) for window in cut_at_pauses(session, encoded)] == ends


def test_what_is_encoded_is_cut_at_pauses_without_the_encoder(session, monkeypatch):
    encoded = session.listen(speech(60.0)).encoded
    density = torch.ones(1500)
    density[550:560] = 0.0
    density[1200:1220] = 0.0
    monkeypatch.setattr(session.model, "density", lambda frames: density)
    monkeypatch.setattr(session.model, "encode", None)
    windows = list(cut_at_pauses(session, encoded))
    assert [len(window.frames) for window in windows] == [555, 655, 290]
    assert torch.equal(torch.cat([window.frames for window in windows]), encoded.frames)
    assert torch.equal(torch.cat([window.starts for window in windows]), encoded.starts)


@pytest.mark.parametrize(
    "ids, looped",
    [
        ([7] * 12, True),
        ([7] * 11, False),
        ([1, 2, 3, 4] * 4, True),
        ([9, 9, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4], True),
        ([1, 2, 3, 4] * 3, False),
        (list(range(40)) * 4, True),
        (list(range(160)), False),
        ([1, 2, 3, 4] * 4 + [5], False),  # it has gone on
        ([], False),
    ],
)
def test_what_counts_as_a_loop(ids, looped):
    assert loops(ids) is looped


def test_generation_ends_when_it_loops(session):
    """A model of random weights says the same again and again; without the criterion it goes on to the limit."""
    heard = session.listen(speech(2.0))
    session.max_new_tokens = 400
    try:
        with_criterion = session.ask(heard, "Who?", stopping=[StopAtLoop()])
        without = session.ask(heard, "Who?")
    finally:
        session.max_new_tokens = 8
    assert not with_criterion.ended
    assert without.text.startswith(with_criterion.text) and len(without.text) > len(with_criterion.text)


HEARD = [Word(word, number, number + 0.8) for number, word in enumerate("a b c d e f g h i j k l".split())]
SAID = " ".join(word.text for word in HEARD)


@pytest.fixture
def write(session, monkeypatch) -> Callable[..., tuple[Window, list]]:
    """Writes one window of 12 s in which HEARD is said, by a language model that gives these answers in turn."""

    def write(*answers: Answer, heard=HEARD, trained=True, by_ctc=False, target_length=100) -> tuple[Window, list]:
        asked, waiting = [], list(answers)

        def ask(what, question, length=None, compression=None, stopping=()):
            assert question == "Transcribe the speech to text without explanation:"
            asked.append((length, compression))
            return waiting.pop(0)

        monkeypatch.setattr(session, "ask", ask)
        monkeypatch.setattr(transcript, "ctc_words", lambda *_: [list(heard)])
        monkeypatch.setattr(session.model.config, "ctc_trained", trained)
        encoded = session.listen(speech(12.0)).encoded
        (window,) = transcribe(session, [encoded], target_length, by_ctc)
        assert (window.start, window.end) == (0.0, 12.0) and not waiting
        return window, asked

    return write


def test_a_text_that_says_what_is_heard_is_taken(write):
    window, asked = write(Answer(SAID.upper(), True))
    assert (window.text, window.by, window.missed) == (SAID.upper(), "language model", 0.0)
    assert [(word.start, word.end) for word in window.words] == [(word.start, word.end) for word in HEARD]
    assert asked == [(100, "iterative_fusion")]


@pytest.mark.parametrize(
    "bad",
    [
        Answer(SAID, False),  # it was stopped
        Answer("a b c d e f", True),  # it stopped half-way
        Answer("", True),
        Answer(SAID + " and then many more words that nobody ever said here", True),
    ],
)
def test_another_text_is_written_again_with_every_frame_and_then_by_ctc(write, bad):
    window, asked = write(bad, Answer(SAID, True))
    assert (window.text, window.by) == (SAID, "every frame")
    assert asked == [(100, "iterative_fusion"), (100, "none")]
    window, asked = write(bad, bad)
    assert (window.text, window.by) == (SAID, "ctc") and len(asked) == 2
    window, asked = write(bad, target_length=300)  # 12 s have 300 frames: all were read at once
    assert window.by == "ctc" and len(asked) == 1


def test_a_few_words_less_are_taken(write):
    window, _ = write(Answer("a b c d i j k l", True))
    assert window.by == "language model"


def test_nobody_is_asked_about_silence(write):
    window, asked = write(heard=[])
    assert (window.text, window.by, asked) == ("", "silence", [])


def test_the_ctc_decoder_writes_alone(write):
    window, asked = write(by_ctc=True)
    assert (window.text, window.words, window.by, asked) == (SAID, tuple(HEARD), "ctc", [])


def test_without_a_ctc_decoder_a_text_is_taken_as_it_is_if_it_ends(write):
    window, _ = write(Answer("anything", True), trained=False, heard=[])
    assert (window.text, window.words, window.by) == ("anything", (), "language model")
    window, asked = write(Answer("la la la", False), Answer("la la", False), trained=False, heard=[])
    assert (window.text, window.by, len(asked)) == ("la la", "unfinished", 2)


def test_coverage_adds_up():
    windows = [
        Window(0, 20, "a", (), "language model", missed=2.5),
        Window(20, 45, "", (), "silence"),
        Window(45, 70, "", (), "unfinished"),
        Window(70, 90, "b", (), "ctc"),
    ]
    found = cover(windows, 100)
    assert (found.seconds, found.read, found.answered, found.silent) == (100, 90, 37.5, 25)
    assert found.empty == ((45, 70),)
    assert found.windows == {"language model": 1, "silence": 1, "unfinished": 1, "ctc": 1}
    assert "read 90.0 of 100.0 s; answered 37.5 s; silence 25.0 s; windows by way: language model 1" in str(found)
    assert str(found).endswith("nothing from 0:45-1:10")
