"""Synthesises the demo corpus with espeak-ng and flite: recordings, transcripts, questions and answers.

    python -m fastlongspeech.demo.corpus work/corpus

The splits, each a folder of FLAC files and three manifests:

- `train` and `dev`: clips under 30 s;
- `train-short`: clips of up to 10 s, on which a model learns to sum up (`demo/summary.yaml`);
- `train-minute`: recordings of up to 75 s, on which it learns to go on (`demo/summary-minute.yaml`);
- `train-long` and `dev-long`: recordings of up to 4 minutes of the same sentences;
- `test`: clips under 30 s of held-out sentences;
- `unheard`: the same, with names and values that training never speaks;
- `long`: held-out recordings of 1 to 4 minutes.

`recordings.jsonl` describes every recording; the training stages read `asr.jsonl` and `qa.jsonl`. Paths in a manifest
are relative to it. Every recording depends on its split and number alone, and one that exists already is kept, so the
script can be stopped and started again.
"""

import argparse
import io
import json
import random
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import librosa
import numpy as np
import soundfile
from tqdm import tqdm

from .sentences import TRANSCRIBE, VOICE_QUESTIONS, PassageWriter

SAMPLING_RATE = 16_000
LOUD = 0.01  # of full scale; quieter sound at a sentence's ends is cut off
DrawFunction = Callable[[int], tuple[np.ndarray, dict]]


@dataclass(frozen=True)
class Voice:
    """A synthetic speaker: ``engine`` is espeak-ng or flite, ``name`` its voice there, ``gender`` man or woman."""

    engine: str
    name: str
    gender: str


VOICES = (
    Voice("espeak-ng", "en-us", "man"),
    Voice("espeak-ng", "en-us+m3", "man"),
    Voice("espeak-ng", "en+m7", "man"),
    Voice("flite", "rms", "man"),
    Voice("espeak-ng", "en-us+f2", "woman"),
    Voice("espeak-ng", "en+f4", "woman"),
    Voice("espeak-ng", "en-us+f3", "woman"),
    Voice("flite", "slt", "woman"),
)


@dataclass(frozen=True)
class Split:
    """How many recordings a split has, how long they are (seconds, drawn uniformly) and what they say."""

    recordings: int
    seconds: tuple[float, float]
    held_out: bool
    questions: int | None = None  # None: one about every fact
    unheard: bool = False


SPLITS = {
    "train": Split(3400, (4, 29), held_out=False),
    "train-short": Split(400, (4, 10), held_out=False),
    "dev": Split(60, (4, 29), held_out=False),
    "train-minute": Split(150, (10, 75), held_out=False, questions=12),
    "train-long": Split(500, (10, 240), held_out=False, questions=12),
    "dev-long": Split(12, (60, 240), held_out=False, questions=5),
    "test": Split(200, (8, 29), held_out=True),
    "unheard": Split(180, (8, 29), held_out=True, unheard=True),
    "long": Split(110, (60, 240), held_out=True, questions=5),
}


def espeak_speed(speed: float) -> int:
    """Returns espeak-ng's words per minute; ``speed`` 1 is normal."""
    return round(150 * speed)


def flite_command(sentence: str, voice: str, speed: float) -> list[str]:
    """Returns flite's command for a sentence, but for what it writes."""
    return ["flite", "-voice", voice, "--setf", f"duration_stretch={1 / speed:.3f}", "-t", sentence]


def speak(sentence: str, voice: Voice, speed: float) -> np.ndarray:
    """Returns the spoken sentence, float32 mono at 16 kHz without silence at its ends; ``speed`` 1 is normal.

    Raises:
        RuntimeError: where the engine is not installed or failed.
    """
    if voice.engine == "espeak-ng":
        command = ["espeak-ng", "-v", voice.name, "-s", str(espeak_speed(speed)), "--stdout", sentence]
    else:
        command = [*flite_command(sentence, voice.name, speed), "-o", "/dev/stdout"]
    try:
        wav = subprocess.run(command, check=True, capture_output=True).stdout
    except FileNotFoundError:
        raise RuntimeError(
            f"{voice.engine} is not installed; install it with: apt-get install espeak-ng flite"
        ) from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{' '.join(command)} failed: {error.stderr.decode().strip()}") from None
    # A streamed WAV header does not know its length: read what follows the 44 bytes of the header.
    rate = int.from_bytes(wav[24:28], "little")
    samples = np.frombuffer(wav[44 : 44 + (len(wav) - 44) // 2 * 2], dtype="<i2").astype(np.float32) / 32768
    samples = librosa.resample(samples, orig_sr=rate, target_sr=SAMPLING_RATE, res_type="soxr_mq")
    loud = np.flatnonzero(np.abs(samples) > LOUD)
    return samples[loud[0] : loud[-1] + 1]


def record(split_name: str, index: int, split: Split | None = None) -> tuple[np.ndarray, dict]:
    """Returns recording ``index`` of a split: float32 samples at 16 kHz, and its description.

    One voice, its own speed, pitch of pauses, loudness and a light noise floor. The description names for every
    sentence its start and end in seconds, and for every fact its question and answer. ``split`` describes a split that
    is not among ``SPLITS``.
    """
    split = split or SPLITS[split_name]
    rng = random.Random(f"{split_name}-{index}")
    voice, speed = rng.choice(VOICES), rng.uniform(0.85, 1.15)
    seconds = rng.uniform(*split.seconds)
    num_kinds = rng.randint(1, 3) if seconds < 30 else rng.randint(4, 8)
    writer = PassageWriter(rng, split.held_out, rng.uniform(0.5, 0.8), num_kinds, split.unheard)
    pause = rng.uniform(0.2, 0.7)
    pieces = [np.zeros(int(rng.uniform(0.1, 0.4) * SAMPLING_RATE), np.float32)]
    length, sentences = len(pieces[0]), list[dict]()
    while True:
        sentence = writer.add_sentence()
        spoken = speak(sentence, voice, speed)
        if sentences and length + len(spoken) > seconds * SAMPLING_RATE:
            break
        silence = np.zeros(int(pause * rng.uniform(0.6, 1.6) * SAMPLING_RATE), np.float32)
        start = length / SAMPLING_RATE
        sentences.append(
            {"text": sentence, "start": round(start, 3), "end": round(start + len(spoken) / SAMPLING_RATE, 3)}
        )
        pieces += [spoken, silence]
        length += len(spoken) + len(silence)
    samples = np.concatenate(pieces)[: int(split.seconds[1] * SAMPLING_RATE)]
    samples *= rng.uniform(0.2, 0.9) / np.abs(samples).max()
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(samples), dtype=np.float32)
    samples += noise * np.sqrt(np.mean(samples**2)) * 10 ** (-rng.uniform(25, 50) / 20)

    questions = [
        {"question": rng.choice(fact.questions()), "answer": fact.value, "kind": fact.kind, "time": sentence["start"]}
        for sentence, fact in zip(sentences, writer.passage.facts[: len(sentences)], strict=True)
        if fact is not None
    ]
    if split.questions is not None:
        # Draw times uniformly over the recording; each takes the nearest fact that is not asked for yet.
        asked: list[dict] = []
        for _ in range(min(split.questions, len(questions))):
            time = rng.uniform(0, length / SAMPLING_RATE)
            nearest = min((q for q in questions if q not in asked), key=lambda q: abs(q["time"] - time))
            asked.append(nearest)
        questions = asked
    questions.append({"question": rng.choice(VOICE_QUESTIONS), "answer": voice.gender, "kind": "voice", "time": 0.0})
    text = " ".join(sentence["text"] for sentence in sentences)
    return np.clip(samples, -1, 1), {
        "audio": f"{index:05d}.flac",
        "duration": round(len(samples) / SAMPLING_RATE, 3),
        "voice": f"{voice.engine} {voice.name}",
        "speed": speed,
        "text": text,
        "sentences": sentences,
        "questions": questions,
    }


def _write_recording(folder: Path, draw: DrawFunction, index: int) -> dict:
    sidecar = folder / f"{index:05d}.json"
    if sidecar.exists():
        return json.loads(sidecar.read_text())
    samples, row = draw(index)
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    (folder / row["audio"]).write_bytes(encoded.getvalue())
    unfinished = sidecar.with_suffix(".tmp")
    unfinished.write_text(json.dumps(row))
    unfinished.replace(sidecar)
    return row


def write_recordings(folder: Path, draw: DrawFunction, recordings: int, workers: int) -> list[dict]:
    """Writes recordings and ``recordings.jsonl`` into a folder, and returns their descriptions.

    ``draw`` returns samples and description of the recording of a number, as ``record``. Recordings that are there are
    kept, so a run that was stopped goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        work = pool.map(partial(_write_recording, folder, draw), range(recordings))
        rows = list(tqdm(work, total=recordings, desc=folder.name, unit="recording"))
    write_jsonl(folder / "recordings.jsonl", rows)
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_split(root: Path, name: str, recordings: int, workers: int) -> None:
    """Writes the first ``recordings`` recordings of a split and its three manifests under ``root/name``."""
    folder = root / name
    rows = write_recordings(folder, partial(record, name), recordings, workers)
    write_jsonl(folder / "asr.jsonl", [{"audio": row["audio"], "text": row["text"]} for row in rows])
    qa = []
    for row in rows:
        for question in row["questions"]:
            qa.append({"audio": row["audio"], **question})
        if SPLITS[name].seconds[1] < 30:
            qa.append({"audio": row["audio"], "question": TRANSCRIBE, "answer": row["text"], "kind": "transcription"})
    write_jsonl(folder / "qa.jsonl", qa)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the corpus")
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), choices=list(SPLITS))
    parser.add_argument("--recordings", type=int, help="this many per split instead of the split's own number")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    for name in arguments.splits:
        write_split(arguments.root, name, arguments.recordings or SPLITS[name].recordings, arguments.workers)


if __name__ == "__main__":
    main()
