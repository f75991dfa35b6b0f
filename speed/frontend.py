"""The front end: decoding a file, and making its log-mel features, on the CPU and on a GPU if there is one.

    python -m fastlongspeech.speed.frontend --device cpu

The files hold noise: FLAC at 16 kHz with one channel, WAV and MP3 at 44.1 kHz with two, which are mixed and resampled.
Our features, made window by window, are compared with those of transformers' extractor for all windows at once. With
`--device` a GPU, memory is the GPU's.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from fastlongspeech import load_recording
from fastlongspeech.app.markdown import table

from .common import Benchmark, figure, number, parse, ratio, tiny_processor

SECONDS = (10, 60, 600, 3600)
FORMATS = {"flac": (16_000, 1), "wav": (44_100, 2), "mp3": (44_100, 2)}  # hertz, channels
WINDOW_SAMPLES = 480_000
MEL, AT_ONCE, ON_DEVICE = "mel", "mel, windows at once", "mel on the GPU"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse(__doc__ or "", argv)
    device, quick = arguments.device, arguments.quick
    processor = tiny_processor(128)
    extractor = processor.feature_extractor
    benchmark = Benchmark("frontend", arguments)
    with tempfile.TemporaryDirectory() as folder:
        for seconds in (1,) if quick else SECONDS:
            files = {name: write_noise(Path(folder, f"{seconds}.{name}"), seconds, *FORMATS[name]) for name in FORMATS}
            samples = load_recording(files["flac"])
            windows = [samples[start : start + WINDOW_SAMPLES] for start in range(0, len(samples), WINDOW_SAMPLES)]
            options: dict[str, Any] = {"sampling_rate": 16_000}
            calls: dict[str, Callable[[], Any]] = {name: partial(load_recording, files[name]) for name in FORMATS}
            calls[MEL] = partial(processor, audio=samples, **options)
            calls[AT_ONCE] = partial(extractor, windows, return_attention_mask=True, return_tensors="pt", **options)
            if device != "cpu":
                calls[ON_DEVICE] = partial(processor, audio=samples, device=device, **options)
            benchmark.measure({"seconds": seconds}, calls, float(seconds))
    print(report(benchmark.results))
    return benchmark.results


def write_noise(path: Path, seconds: float, rate: int, channels: int) -> Path:
    """Writes noise, a minute at a time, and returns the path."""
    generator = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", rate, channels) as file:
        for start in range(0, round(seconds * rate), 60 * rate):
            count = min(60 * rate, round(seconds * rate) - start)
            file.write(0.1 * generator.standard_normal((count, channels), dtype=np.float32))
    return path


def report(results: dict[str, Any]) -> str:
    """Returns the table of results."""
    names = [*FORMATS, MEL, AT_ONCE, *([ON_DEVICE] if "cuda" in results["command"] else [])]
    compared = [name for name in (AT_ONCE, ON_DEVICE) if name in names]
    rows = [
        [
            f"{row['case']['seconds']:,}",
            *(number(ratio(row, name, MEL)) for name in compared),
            *(figure(row, name, "seconds") for name in names),
            *(figure(row, name, "bytes", 1e6) for name in names),
        ]
        for row in results["rows"]
    ]
    headings = [f"{name} / {MEL}" for name in compared]
    headings += [f"{name}, {unit}" for unit in ("s", "MB") for name in names]
    return table(["recording, s", *headings], rows)


if __name__ == "__main__":
    main()
