"""What decoders of audio read of whole, cut and mislabelled files: the table of docs/audio.md.

    pip install torchcodec  # left out of the table where it is missing
    python -m fastlongspeech.speed.decoders demo/recording.flac

`ffmpeg` makes the files from the recording. Every cell has the seconds that a decoder returns of the file.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import soundfile
from transformers.audio_utils import load_audio

from fastlongspeech import load_recording
from fastlongspeech.app.markdown import table

try:
    from torchcodec.decoders import AudioDecoder
except (ImportError, OSError, RuntimeError):  # what a build for another torch raises
    AudioDecoder = None

FILES = {  # ffmpeg's options, of which the last is the file's name
    "WAV": ["a.wav"],
    "RF64": ["-rf64", "always", "a.wav"],
    "W64": ["a.w64"],
    "CAF": ["a.caf"],
    "AIFF": ["a.aiff"],
    "AU": ["a.au"],
    "FLAC": ["a.flac"],
    "MP3": ["a.mp3"],
    "OGG Vorbis": ["a.ogg"],
    "Opus": ["a.opus"],
    "WebM": ["-c:a", "libopus", "a.webm"],
    "M4A": ["a.m4a"],
    "MP3, variable bit rate, no header": ["-q:a", "6", "-write_xing", "0", "a.mp3"],
    "WebM, live": ["-c:a", "libopus", "-live", "1", "a.webm"],
    "FLAC, piped": ["-f", "flac", "pipe:"],
    "AIFF, piped": ["-f", "aiff", "pipe:"],
    "W64, piped": ["-f", "w64", "pipe:"],
    "raw mu-law": ["-f", "mulaw", "x.ul"],
}
CUT = list(FILES)[:12]


def main() -> None:
    readers: dict[str, Callable[[Path], float]] = {
        "load_recording": lambda path: len(load_recording(path)) / 16_000,
        "PyAV alone": read_by_pyav,
        "soundfile": read_by_soundfile,
        "transformers": lambda path: len(load_audio(str(path), 16_000)) / 16_000,
    }
    if AudioDecoder is not None:
        readers["torchcodec"] = read_by_torchcodec
    with tempfile.TemporaryDirectory() as folder:
        rows = [[name, *(seconds(read, path) for read in readers.values())] for name, path in make_files(Path(folder))]
    print(table(["file", *readers], rows))


def seconds(read: Callable[[Path], float], path: Path) -> str:
    try:
        return f"{read(path):.1f}"
    except Exception:
        return "refused"


def read_by_pyav(path: Path) -> float:
    with av.open(str(path)) as container:
        return sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))


def read_by_soundfile(path: Path) -> float:
    samples, rate = soundfile.read(path)
    return len(samples) / rate


def read_by_torchcodec(path: Path) -> float:
    samples = AudioDecoder(str(path)).get_all_samples()
    return samples.data.shape[1] / samples.sample_rate


def make_files(folder: Path):
    """Yields the name and the path of every file."""
    contents = {}
    for number, (name, options) in enumerate(FILES.items()):
        piped = options[-1] == "pipe:"
        path = folder / f"{number}-{'a.' + options[1] if piped else options[-1]}"
        output = "pipe:" if piped else path
        command = ["ffmpeg", "-nostdin", "-v", "error", "-i", sys.argv[1], *options[:-1], output]
        made = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        if piped:
            path.write_bytes(made)
        contents[name] = path.read_bytes()
        yield name, path
        if name in CUT:
            half = path.with_name(f"half-{path.name}")
            half.write_bytes(contents[name][: len(contents[name]) // 2])
            yield f"{name}, first half", half

    def changed(name: str, suffix: str, content: bytes | bytearray) -> tuple[str, Path]:
        path = folder / f"{len(contents)}-{name.replace(' ', '-').replace(',', '')}.{suffix}"
        path.write_bytes(content)
        return name, path

    mp3, wav, ogg = bytearray(contents["MP3"]), bytearray(contents["WAV"]), contents["OGG Vorbis"]
    yield changed("MP3 twice", "mp3", mp3 + mp3)
    frames = max(mp3.find(b"Xing"), mp3.find(b"Info")) + 8
    mp3[frames : frames + 4] = (1000).to_bytes(4, "big")
    yield changed("MP3, header names 1000 frames", "mp3", mp3)
    size = wav.index(b"data") + 4
    wav[size : size + 4] = bytes(4)
    yield changed("WAV, header names 0 bytes", "wav", wav)
    wav[size : size + 4] = (len(wav) // 2).to_bytes(4, "little")
    yield changed("WAV, header names half", "wav", wav)
    yield changed("OGG Vorbis twice", "ogg", ogg + ogg)
    flac = bytearray(contents["FLAC"])
    flac[len(flac) // 2 : len(flac) // 2 + 1000] = bytes(1000)
    yield changed("FLAC, 1000 bytes lost", "flac", flac)
    yield changed("OGG Vorbis, a part lost", "ogg", ogg[: len(ogg) // 2] + ogg[len(ogg) // 2 + 20_000 :])


if __name__ == "__main__":
    main()
