"""Parts of the server, without any request: what it holds back of an answer, and which recordings it keeps."""

import asyncio
import threading
from typing import Any

from test_serve import LIMIT, MODEL, noise

from fastlongspeech import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from fastlongspeech.serve.fields import StoppingQueue
from fastlongspeech.serve.recordings import Recordings


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    pieces: asyncio.Queue = asyncio.Queue()
    for piece in ("a b", "b", " c<", "e", "nd>x", "y", None):
        pieces.put_nowait(piece)
    queue = StoppingQueue(pieces, ["<end>", "bbb"])
    got = iter(queue.get_nowait, None)
    assert list(got) == ["a ", "", "bb c", "", "", "", ""]


def test_what_was_used_least_recently_goes_first() -> None:
    processor = FastLongSpeechProcessor.from_pretrained(MODEL)
    model = FastLongSpeechForConditionalGeneration.from_pretrained(MODEL).eval()
    gone = threading.Event()
    of_one = 50 * (256 * 4 + 16)  # frames of 2 s, each of 256 float32 and two float64
    recordings = Recordings(processor, LIMIT, keep_bytes=2 * of_one)
    contents = [noise(2, seed) for seed in range(3)]

    def hear(number: int) -> Any:
        recording = recordings.take(contents[number])
        recordings.encode(recording, model, gone)
        return recording

    first, second = hear(0), hear(1)
    assert first.nbytes == of_one
    assert hear(0) is first  # used again
    hear(2)
    assert recordings.take(contents[0]) is first
    assert recordings.take(contents[1]) is not second


def test_nothing_is_kept_with_no_room() -> None:
    processor = FastLongSpeechProcessor.from_pretrained(MODEL)
    model = FastLongSpeechForConditionalGeneration.from_pretrained(MODEL).eval()
    recordings = Recordings(processor, LIMIT, keep_bytes=0)
    first = recordings.take(noise(1, 0))
    assert recordings.take(noise(1, 0)) is first  # two requests at once share their work
    recordings.encode(first, model, threading.Event())
    assert recordings.take(noise(1, 0)) is not first
