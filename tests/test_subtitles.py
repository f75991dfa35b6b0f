"""Subtitles are short, end at pauses, and are read by FFmpeg as they were written."""

import json
import random
import re
from pathlib import Path
from typing import Any

import av
import pytest

from fastlongspeech.app.subtitles import Segment, as_json, as_srt, as_vtt, clock, segments, timestamp
from fastlongspeech.app.words import Word


def spoken(text: str, start: float = 0.0, each: float = 0.3) -> list[Word]:
    """Words said one after the other, without a pause."""
    return [Word(word, start + each * n, start + each * (n + 1)) for n, word in enumerate(text.split())]


def test_a_pause_and_the_end_of_a_sentence_end_a_segment():
    words = [*spoken("We met. Then she left"), *spoken("for home", start=2.5)]
    assert [(segment.start, segment.text) for segment in segments(words)] == [
        (0.0, "We met."),
        (pytest.approx(0.6), "Then she left"),
        (2.5, "for home"),
    ]


def test_a_segment_is_no_longer_than_one_can_read():
    found = segments(spoken("word " * 100, each=0.2))
    assert all(len(segment.text) <= 84 and segment.end - segment.start <= 7 for segment in found)
    assert " ".join(segment.text for segment in found).split() == ["word"] * 100
    assert segments([]) == []


def random_words(seed: int) -> list[Word]:
    """Words of every length and duration, with and without pauses, as a CTC decoder may hear them: 40 ms or more."""
    draw, at, words = random.Random(seed), 0.0, []
    for _ in range(draw.randint(1, 80)):
        at += draw.choice([0.0, 0.0, 0.0, 0.04, 0.2, 0.6, 3.0])
        end = at + draw.choice([0.04, 0.04, 0.08, 0.3, 2.0, 9.0])
        letters = draw.choice([1, 3, 5, 8, 13, 30, 41, 42, 43, 84, 85, 200])
        words.append(Word("x" * letters + draw.choice(["", "", "", ".", "?", "-y"]), at, end))
        at = end
    return words


def read_vtt(text: str) -> list[tuple[float, float, list[str]]]:
    """The start and end in seconds, and the lines, of every cue."""
    found = []
    for block in text.split("\n\n")[1:]:
        times, *lines = block.strip().split("\n")
        clocks = re.findall(r"(\d\d):(\d\d):(\d\d\.\d{3})", times)
        start, end = (int(hours) * 3600 + int(minutes) * 60 + float(seconds) for hours, minutes, seconds in clocks)
        found.append((start, end, lines))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_every_cue_can_be_read(seed):
    words = random_words(seed)
    for said in (segments(words), words):
        cues = read_vtt(as_vtt(said))
        assert "".join("".join(lines) for _, _, lines in cues).replace(" ", "") == "".join(w.text for w in words)
        assert all(len(lines) <= 2 and max(map(len, lines)) <= 42 for _, _, lines in cues)
        begins = [start for start, _, _ in cues[1:]] + [float("inf")]
        for (start, end, _), begin in zip(cues, begins, strict=True):
            assert start < end <= begin and end - start <= 7.001
            assert end - start >= 0.799 or end == begin
    assert " ".join(segment.text for segment in segments(words)) == " ".join(word.text for word in words)
    assert all(0 < segment.end - segment.start <= 7.001 for segment in segments(words))


def test_words_that_no_two_lines_can_hold_are_two_segments():
    words = spoken("x" * 20 + " " + "y" * 30 + " " + "z" * 30)  # 82 characters, but at best 20 and 61 in lines
    assert [segment.text for segment in segments(words)] == ["x" * 20 + " " + "y" * 30, "z" * 30]


def test_a_short_cue_stays_but_not_beyond_the_next_one():
    cues = [Segment(1.0, 1.04, "No."), Segment(1.5, 1.54, "Yes."), Segment(4.0, 5.0, "Why?")]
    assert [cue[:2] for cue in read_vtt(as_vtt(cues))] == [(1.0, 1.5), (1.5, 2.3), (4.0, 5.0)]


CUES = [
    Segment(0.5, 2.25, "Tom & Jerry said: <i>a < b</i>"),
    Segment(3599.9996, 3606.042, "a line that is too long for one line of a film, so it takes two"),
]


@pytest.mark.parametrize("write, name", [(as_srt, "a.srt"), (as_vtt, "a.vtt")])
def test_ffmpeg_reads_the_times_and_texts(write, name, tmp_path: Path):
    path = tmp_path / name
    path.write_text(write(CUES), encoding="utf-8")
    with av.open(str(path)) as file:
        packets = [packet for packet in file.demux(file.streams.subtitles[0]) if packet.size]
    times: list[Any] = [(p.pts, p.duration, p.time_base) for p in packets]
    read = [(float(start * unit), float((start + length) * unit)) for start, length, unit in times]
    assert read == [(0.5, 2.25), (3600.0, 3606.042)]
    lines = bytes(packets[1]).decode().split("\n")
    assert " ".join(lines) == CUES[1].text and max(map(len, lines)) <= 42
    shown = bytes(packets[0]).decode()
    assert shown == (CUES[0].text if write is as_srt else "Tom &amp; Jerry said: &lt;i&gt;a &lt; b&lt;/i&gt;")


def test_no_cue_at_all_is_a_valid_file():
    assert as_srt([]) == ""
    assert as_vtt([]) == "WEBVTT\n"


def test_times_as_text():
    assert timestamp(3661.0426) == "01:01:01.043"
    assert timestamp(59.9996, ",") == "00:01:00,000"
    assert [clock(seconds) for seconds in (0, 9.9, 751.2, 3723)] == ["0:00", "0:09", "12:31", "1:02:03"]


def test_json_names_the_fields_and_rounds_to_milliseconds():
    text = as_json({"segments": [Segment(0.1 + 0.2, 1.0, "é")], "read": 3.0000001, "ended": True})
    assert json.loads(text) == {"segments": [{"start": 0.3, "end": 1.0, "text": "é"}], "read": 3.0, "ended": True}
    assert text.endswith("\n") and "é" in text
