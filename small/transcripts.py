"""Word errors and coverage of transcripts of people, 10 and 60 minutes long, beside faster-whisper.

    pip install faster-whisper
    python -m fastlongspeech.small.transcripts --speech FOLDER --model MODEL --whisper base

The recordings are the long ones of the tests, then the clips, one after the other, up to the minutes asked for; clips
are taken whole. Texts are compared after Whisper's English normaliser. `missing` are the words of the text that the
transcript lacks (deletions); `longest gap` the most that it lacks in a row: a transcript that stops half-way has many.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jiwer
import numpy as np

from .. import load_recording
from ..app.markdown import table
from ..app.session import Session
from ..app.transcript import cover, read_windows, transcribe
from ..evaluation.scoring import whisper_normalizer
from .speed import RATE


def read_people(speech: Path, seconds: float) -> tuple[np.ndarray, str]:
    """Returns the samples of test recordings, one after the other and so many seconds or little more, and their text.

    Raises:
        ValueError: there are not so many seconds.
    """
    pieces: list[np.ndarray] = []
    texts, total = [], 0
    for name in ("test_long.jsonl", "test.jsonl"):
        for line in (speech / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            samples = load_recording(str(speech / row["audio"]), target_rate=RATE)
            for segment in row.get("segments") or [{"start": 0.0, "end": len(samples) / RATE, "text": row["text"]}]:
                pieces.append(samples[round(segment["start"] * RATE) : round(segment["end"] * RATE)])
                texts.append(segment["text"])
                total += len(pieces[-1])
                if total >= seconds * RATE:
                    return np.concatenate(pieces), " ".join(texts)
    raise ValueError(f"{speech} has {total / RATE:.0f} s of test recordings, fewer than {seconds:.0f}.")


def longest_gap(output: Any) -> int:
    """Returns the most reference words in a row that a transcript lacks, by jiwer's alignment."""
    gaps = [chunk.ref_end_idx - chunk.ref_start_idx for chunk in output.alignments[0] if chunk.type == "delete"]
    return max(gaps, default=0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech", type=Path, required=True, help="folder with test.jsonl and test_long.jsonl")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--whisper", help="name or folder of a model of faster-whisper")
    parser.add_argument("--minutes", type=float, nargs="+", default=[10, 60])
    parser.add_argument("--ways", nargs="+", default=["ctc", "language model", "faster-whisper"])
    parser.add_argument("--output", type=Path, required=True, help="folder for the transcripts")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    session = Session(arguments.model, dtype=arguments.dtype, max_new_tokens=300)
    normalize = whisper_normalizer()

    def ours(by_ctc: bool) -> Callable[[np.ndarray], tuple[str, str]]:
        def write(samples: np.ndarray) -> tuple[str, str]:
            windows = list(transcribe(session, read_windows(session, samples), by_ctc=by_ctc))
            text = " ".join(window.text for window in windows)
            return text, str(cover(windows, len(samples) / RATE))

        return write

    def rival(samples: np.ndarray) -> tuple[str, str]:
        from faster_whisper import WhisperModel

        model = WhisperModel(arguments.whisper, "cpu", compute_type="int8", cpu_threads=1)
        segments, _ = model.transcribe(samples, language="en", beam_size=1)
        return " ".join(segment.text.strip() for segment in segments), "it reports none"

    ways = {"ctc": ours(True), "language model": ours(False), "faster-whisper": rival}
    rows = []
    for minutes in arguments.minutes:
        samples, text = read_people(arguments.speech, 60 * minutes)
        reference = normalize(text)
        for way in arguments.ways:
            written, coverage = ways[way](samples)
            (arguments.output / f"{minutes:g}-{way.replace(' ', '-')}.txt").write_text(written, encoding="utf-8")
            found = jiwer.process_words(reference, normalize(written))
            words = found.hits + found.substitutions + found.deletions
            shares = [f"{found.wer:.1%}", f"{found.deletions / words:.1%}", f"{longest_gap(found)} words"]
            rows.append([f"{len(samples) / RATE / 60:.1f} min", way, *shares, coverage])
            print(*rows[-1], sep=" | ", flush=True)
    print(table(["recording", "by", "word errors", "missing", "longest gap", "coverage report"], rows))


if __name__ == "__main__":
    main()
