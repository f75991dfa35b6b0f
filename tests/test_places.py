"""An answer leans on the stretch of a recording where its words, and those of the question, are heard."""

from pathlib import Path

import pytest
from conftest import speech

from fastlongspeech.app.places import Place, find_place
from fastlongspeech.app.session import Session
from fastlongspeech.app.words import Word


def spoken(text: str, start: float = 0.0) -> list[Word]:
    """Words of half a second, one after the other."""
    return [Word(word, start + n / 2, start + (n + 1) / 2) for n, word in enumerate(text.split())]


FILLER = "and so it went on with the people of the town and with all of them for days "
STORY = spoken(FILLER * 3 + "patrik arives on tuesdy at ten " + FILLER * 3 + "helen came on monday " + FILLER)


def test_the_place_is_where_the_words_are_said_also_misspelt():
    place = find_place([STORY], "When does Patrick arrive?", "On Tuesday at ten.")
    assert place is not None and place.recording == 0
    first = next(word for word in STORY if word.text == "patrik")
    last = next(word for word in STORY if word.text == "ten")
    assert (place.start, place.end) == (first.start, last.end)
    place = find_place([STORY], "When did Helen come?", "on Monday")
    assert place is not None and place.start == next(word.start for word in STORY if word.text == "helen")


def test_the_place_is_in_the_recording_that_says_it():
    place = find_place([spoken(FILLER * 2), STORY], "When does Patrick arrive?", "on Tuesday")
    assert place is not None and place.recording == 1


def test_a_rare_word_counts_more_than_a_common_one():
    story = spoken("the the the the the the the the the the the the " * 4 + "king " + "the " * 40)
    place = find_place([story], "Who is the man?", "The king")
    king = next(word for word in story if word.text == "king")
    assert place is not None and place.start <= king.start and king.end <= place.end


def test_without_a_word_in_common_there_is_no_place():
    assert find_place([STORY], "Xylophone?", "zzzzz") is None
    assert find_place([[]], "Who?", "nobody") is None
    assert find_place([STORY], "", "") is None


def test_places_need_a_trained_ctc_decoder(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    session = Session(checkpoint)
    heard = session.listen([speech(2.0), speech(3.0)])
    text = session.transcribe_by_ctc(heard)[1].split()[-1]
    place = session.find_place(heard, "", text)
    assert isinstance(place, Place) and 0 <= place.start < place.end <= 3.0
    monkeypatch.setattr(session.model.config, "ctc_trained", False)
    assert session.find_place(heard, "", text) is None
