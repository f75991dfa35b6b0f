"""When the synthesizers speak which phone and word. The demo's encoder learns to hear these first.

espeak-ng tells through its library, flite on its standard output. Both are asked for a sentence again. Phones are
timed from the first loud sample on, where `speak` in `corpus.py` cuts the sentence's beginning.
"""

import ctypes
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

from .corpus import LOUD, espeak_speed, flite_command

SILENCE = "_"
# Phones that sound alike get one name, espeak-ng's, so that the voices of both synthesizers teach each other.
ESPEAK = {
    "@2": "@",
    "@-": "@",
    "a#": "@",
    "3": "3:",
    "I2": "I",
    "I#": "I",
    "i": "i:",
    "aa": "a",
    "O2": "O:",
    "r-": "r",
}
ESPEAK |= {"t#": "t", "t2": "t", "aI@": "aI", "aI3": "aI", "A:": "0"}
FLITE = {"aa": "0", "ae": "a", "ah": "V", "ao": "O:", "aw": "aU", "ax": "@", "ay": "aI", "ch": "tS", "dh": "D"}
FLITE |= {"eh": "E", "er": "3:", "ey": "eI", "hh": "h", "ih": "I", "iy": "i:", "jh": "dZ", "ng": "N", "ow": "oU"}
FLITE |= {"oy": "OI", "pau": SILENCE, "sh": "S", "th": "T", "uh": "U", "uw": "u:", "y": "j", "zh": "Z"}
# espeak-ng's speak_lib.h
SYNCHRONOUS, PHONEME_EVENTS, RATE, UTF8, PHONEME = 2, 1, 1, 1, 7


class Phone(NamedTuple):
    """A phone by espeak-ng's name for it, the word it is part of ("" in silence), and where it begins: seconds from
    the sentence's first loud sample."""

    name: str
    word: str
    start: float


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class _Espeak:
    """espeak-ng's library, of which a process has one."""

    def __init__(self) -> None:
        try:
            self.library = ctypes.CDLL("libespeak-ng.so.1")
        except OSError:
            raise RuntimeError("libespeak-ng is not installed; install it with: apt-get install espeak-ng") from None
        self.rate = self.library.espeak_Initialize(SYNCHRONOUS, 0, None, PHONEME_EVENTS)
        self.samples: list[np.ndarray] = []
        self.phones: list[tuple[str, int]] = []
        self.callback = _Callback(self._receive)
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if count > 0:
            self.samples.append(np.ctypeslib.as_array(samples, (count,)).copy())
        number = 0
        while events[number].type:
            if events[number].type == PHONEME:
                self.phones.append((events[number].name.decode(), events[number].sample))
            number += 1
        return 0

    def speak(self, sentence: str, voice: str, speed: float) -> list[tuple[str, float]]:
        self.samples, self.phones = [], []
        text = sentence.encode()
        self.library.espeak_SetVoiceByName(voice.encode())
        self.library.espeak_SetParameter(RATE, espeak_speed(speed), 0)
        self.library.espeak_Synth(text, len(text) + 1, 0, 0, 0, UTF8, None, None)
        first = _first_loud(np.concatenate(self.samples) / 32768)
        return [
            (SILENCE if name.startswith(SILENCE) else ESPEAK.get(name, name), (sample - first) / self.rate)
            for name, sample in self.phones
        ]


_espeak = cache(_Espeak)


def _flite(sentence: str, voice: str, speed: float) -> list[tuple[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder, "spoken.wav")
        command = [*flite_command(sentence, voice, speed), "-psdur", "-o", str(wav)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        samples, rate = soundfile.read(wav)
    names, ends = zip(*(phone.split(":") for phone in printed.split()), strict=True)
    starts = [0.0, *map(float, ends[:-1])]
    first = _first_loud(samples) / rate
    return [(FLITE.get(name, name), start - first) for name, start in zip(names, starts, strict=True)]


def _first_loud(samples: np.ndarray) -> int:
    return int(np.flatnonzero(np.abs(samples) > LOUD)[0])


def _ask(sentence: str, voice: str, speed: float) -> list[tuple[str, float]]:
    engine, name = voice.split(" ", 1)
    return _espeak().speak(sentence, name, speed) if engine == "espeak-ng" else _flite(sentence, name, speed)


@cache
def _count_phones(word: str, voice: str) -> int:
    return sum(name != SILENCE for name, _ in _ask(word, voice, 1.0))


def time_phones(sentence: str, voice: str, speed: float) -> list[Phone]:
    """Returns the phones of a sentence as `speak` in `corpus.py` speaks it; ``voice`` is engine and name.

    A word takes as many phones as when it is spoken alone. If these do not add up to the sentence's phones, the
    nearest split is taken.
    """
    phones = _ask(sentence, voice, speed)
    words = sentence.split()
    ends = np.cumsum([_count_phones(word, voice) for word in words])
    ends = ends * sum(name != SILENCE for name, _ in phones) / ends[-1]
    spoken, timed = 0, []
    for name, start in phones:
        silent = name == SILENCE
        timed.append(Phone(name, "" if silent else words[int(np.searchsorted(ends, spoken + 0.5))], start))
        spoken += not silent
    return timed


def _phones_of(row: dict) -> list[Phone]:
    """Returns the phones of a recording, each with where it begins in seconds of the recording."""
    found = []
    for sentence in row["sentences"]:
        for phone in time_phones(sentence["text"], row["voice"], row["speed"]):
            if sentence["start"] + phone.start < sentence["end"]:
                found.append(phone._replace(start=sentence["start"] + max(0.0, phone.start)))
        found.append(Phone(SILENCE, "", sentence["end"]))
    return found


class FrameLabels(NamedTuple):
    """What is spoken when: ``names`` of all labels, silence first, and for every recording the place in them of each
    frame's label, ``labels[i]`` (frames,) int16."""

    names: list[str]
    labels: list[np.ndarray]


def label_frames(rows: list[dict], lengths: list[int], frame_rate: int) -> tuple[FrameLabels, FrameLabels]:
    """Returns the phones and the words of every frame.

    Args:
        rows: descriptions of recordings.
        lengths: the frames of each.
        frame_rate: frames per second.
    """
    with ProcessPoolExecutor(2) as pool:
        work = pool.map(_phones_of, rows, chunksize=16)
        phones = list(tqdm(work, total=len(rows), desc="phones", mininterval=10))

    def label(silence: str, field: str) -> FrameLabels:
        names = [silence, *sorted({getattr(phone, field) for of_row in phones for phone in of_row} - {silence})]
        number = {name: index for index, name in enumerate(names)}
        labels = [np.zeros(length, dtype=np.int16) for length in lengths]
        for row, of_row in zip(labels, phones, strict=True):
            for phone in of_row:
                row[round(phone.start * frame_rate) :] = number[getattr(phone, field)]
        return FrameLabels(names, labels)

    return label(SILENCE, "name"), label("", "word")
