"""Words have the seconds of the CTC frames that say them, and a text is laid along the words that were heard."""

import random
from collections.abc import Callable
from itertools import groupby

import pytest
import torch
from conftest import speech

from fastlongspeech.app.session import Session
from fastlongspeech.app.words import Word, ctc_words, lay_along

HEARD = [Word("the", 1.0, 1.2), Word("caat", 1.4, 1.8), Word("sat", 3.0, 3.2), Word("on", 3.3, 3.4)]


@pytest.fixture(scope="module")
def session(checkpoint) -> Session:
    return Session(checkpoint)


@pytest.fixture
def say(session, monkeypatch) -> Callable[[str], None]:
    """Lets the CTC decoder hear these pieces, one a frame, `_` for the blank, and blanks from there on."""

    def hear(pieces: str) -> None:
        ids = [
            session.model.config.ctc_blank if piece == "_" else session.processor.ctc_tokenizer.piece_to_id(piece)
            for piece in pieces
        ]

        def of_frames(encoded):
            blanks = torch.full((len(encoded.frames) - len(ids),), session.model.config.ctc_blank)
            return torch.cat((torch.tensor(ids), blanks))

        monkeypatch.setattr(session.model, "ctc_pieces", of_frames)

    return hear


def test_a_word_lasts_from_its_first_frame_to_its_last(session, say):
    heard = session.listen(speech(2.0))
    say("__▁caa_t____▁s__at")
    assert ctc_words(session.model, session.processor, heard.encoded) == [
        [Word("cat", pytest.approx(0.08), pytest.approx(0.32)), Word("sat", pytest.approx(0.48), pytest.approx(0.72))]
    ]


def test_the_words_are_those_of_the_ctc_transcript_and_the_times_those_of_the_frames(session):
    heard = session.listen([speech(31.0), speech(2.0, seed=1)])
    found = ctc_words(session.model, session.processor, heard.encoded)
    texts = session.processor.ctc_decode(session.model.ctc_transcribe(recordings=heard.encoded))
    assert [" ".join(word.text for word in words) for words in found] == [" ".join(text.split()) for text in texts]
    for number, words in enumerate(found):
        recording = heard.encoded[number]
        best = session.model.ctc_pieces(recording).tolist()
        spoken = [(piece, [frame for frame, _ in run]) for piece, run in groupby(enumerate(best), lambda x: x[1])]
        first, last = next(r for p, r in spoken if p != session.model.config.ctc_blank), None
        *_, last = (r for p, r in spoken if p != session.model.config.ctc_blank)
        assert words[0].start == float(recording.starts[first[0]])
        assert words[-1].end == float(recording.ends[last[-1]])


def test_pieces_are_those_that_the_transcript_collapses(session):
    heard = session.listen(speech(2.0))
    pieces = session.model.ctc_pieces(heard.encoded)
    assert pieces.shape == (50,) and pieces.dtype == torch.int64
    kept = [piece for piece, _ in groupby(pieces.tolist()) if piece != session.model.config.ctc_blank]
    assert session.model.ctc_transcribe(recordings=heard.encoded) == [kept]


def test_an_untrained_decoder_hears_no_words(session, monkeypatch):
    heard = session.listen(speech(1.0))
    monkeypatch.setattr(session.model.config, "ctc_trained", False)
    with pytest.raises(ValueError, match="ctc_trained is false"):
        ctc_words(session.model, session.processor, heard.encoded)


def test_words_of_a_text_take_the_times_of_the_words_that_they_match():
    words, matched = lay_along("The cat sat, on", HEARD, 0.0, 5.0)
    assert [(word.text, word.start, word.end) for word in words] == [
        ("The", 1.0, 1.2),
        ("cat", 1.4, 1.8),
        ("sat,", 3.0, 3.2),
        ("on", 3.3, 3.4),
    ]
    assert matched == [True] * 4


def test_words_between_two_that_match_share_the_time_evenly():
    words, matched = lay_along("the cat quickly jumped sat", HEARD, 0.0, 5.0)
    times = [time for word in words[2:4] for time in (word.start, word.end)]
    assert times == pytest.approx([1.8, 2.4, 2.4, 3.0])
    assert matched == [True, True, True, False]


def test_words_between_two_that_are_heard_in_adjacent_frames_have_time():
    heard = [Word("the", 1.0, 1.04), Word("sat", 1.04, 1.08), Word("on", 4.96, 5.0)]
    words, _ = lay_along("the big sat on it too", heard, 0.0, 5.0)
    times = [time for word in words for time in (word.start, word.end)]
    assert times == pytest.approx([1.0, 1.04, 1.04, 1.06, 1.06, 1.08, 4.94, 4.96, 4.96, 4.98, 4.98, 5.0])


@pytest.mark.parametrize("seed", range(40))
def test_words_of_any_text_are_in_order_and_have_time(seed):
    draw = random.Random(seed)
    frames = sorted(draw.sample(range(100), draw.randint(0, 60)))
    heard = [Word(draw.choice("abcdefgh") * 4, frame * 0.04, frame * 0.04 + 0.04) for frame in frames]
    text = [word for heard_word in heard for word in draw.choice([[], [heard_word.text], [heard_word.text, "yyyy"]])]
    text += ["zzzz"] * draw.randint(0, 5)
    words, _ = lay_along(" ".join(text), heard, 0.0, 4.0)
    assert [word.text for word in words] == text
    assert all(word.end - word.start >= 0.0199 for word in words)
    edges = [time for word in words for time in (word.start, word.end)]
    assert edges == sorted(edges) and all(-1e-9 <= edge <= 4.0 for edge in edges)


def test_words_that_nothing_matches_stay_between_the_times_given():
    words, matched = lay_along("zzz qqq", HEARD, 0.5, 5.0)
    assert matched == [False] * 4
    assert words[0].start == 0.5 and words[-1].end <= 5.0
    assert lay_along("one two", [], 2.0, 4.0) == ([Word("one", 2.0, 3.0), Word("two", 3.0, 4.0)], [])
    assert lay_along("", HEARD, 0.0, 5.0) == ([], [False] * 4)
