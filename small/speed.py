"""Seconds to an answer about a recording, beside what a user would do instead: faster-whisper, then a language model.

    pip install faster-whisper
    python -m fastlongspeech.small.speed CORPUS --speech FOLDER --model MODEL --output SPEED --page PAGE

The rival is Whisper base, whose encoder the small model began with, run by faster-whisper on as many threads, with
beams of one; then the small model's own language model reads that transcript and answers. Recordings are of people
who read: the test clips one after the other, cut at 2, 10 and 60 minutes. Every way runs in turn, once to warm up on
the shortest recording, then `--repeats` times; ratios are medians over pairs that ran in turn. Beside the seconds
stand the answers to the questions about recordings of people, given by each way. A run that was stopped goes on with
the next duration or recording.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import soundfile
import torch
from tqdm import tqdm

from .. import load_recording
from ..app.loading import find_device, load_model
from ..app.markdown import insert_blocks, table
from ..evaluation.answering import Answerer
from ..evaluation.journal import Journal, begin_journal
from ..evaluation.scoring import mean_with_interval, token_f1, whisper_normalizer, word_errors
from ..speed.common import describe_machine
from .evaluate import PROMPT, SETS, read_rows
from .report import HEAD, percent

WRITER = "small/speed.py"
RATE = 16_000
SECONDS = (120, 600, 3600)
LENGTHS = (750, 400)
ANSWER_TOKENS = 20
QUESTION = "What is the recording about?"
TYPES = ("int8", "float32")  # of faster-whisper's weights
TOO_LONG = "transcript too long"


class Whisper:
    """faster-whisper, as a user would call it.

    Args:
        name: of a model that faster-whisper knows, or the folder of one.
        device: as torch names it.
        compute_type: of its weights.

    Raises:
        ValueError: faster-whisper is missing.
    """

    def __init__(self, name: str, device: str, compute_type: str) -> None:
        try:
            from faster_whisper import WhisperModel
        except ModuleNotFoundError as error:
            raise ValueError("faster-whisper is missing; install it with: pip install faster-whisper.") from error
        self.model = WhisperModel(
            name, device.split(":")[0], compute_type=compute_type, cpu_threads=torch.get_num_threads()
        )

    def __call__(self, path: str) -> str:
        """Returns the transcript of a recording."""
        parts, _ = self.model.transcribe(path, language="en", beam_size=1)
        return " ".join(part.text.strip() for part in parts)


def joined(speech: Path, seconds: float, path: Path) -> Path:
    """Writes the test clips of people one after the other, so many seconds of them, and returns the file.

    Raises:
        ValueError: the clips are not as long together.
    """
    missing = round(seconds * RATE)
    with soundfile.SoundFile(path, "w", RATE, 1) as file:
        for name in ("test_long.jsonl", "test.jsonl"):
            for row in read_rows(speech / name):
                samples = load_recording(row["audio"])[:missing]
                file.write(samples)
                missing -= len(samples)
                if not missing:
                    return path
    raise ValueError(f"{speech} has {missing / RATE:.0f} s too little speech for a recording of {seconds} s.")


def ways(model: Any, processor: Any, rivals: dict[str, Callable[[str], str]]) -> dict[str, Callable[..., Any]]:
    """Returns what answers questions about a recording, by name: `(path, questions, most tokens)` to answers, and the
    transcript where there is one."""

    def hears(length: int) -> Callable[..., Any]:
        def call(path: str, questions: Sequence[str], tokens: int) -> tuple[list[str], str | None]:
            answerer = Answerer(model, processor, "iterative_fusion", length, tokens)
            return [
                answer.text for answer in answerer.answer(questions, [path] * len(questions), [path] * len(questions))
            ], None

        return call

    def reads(transcribe: Callable[[str], str]) -> Callable[..., Any]:
        def call(path: str, questions: Sequence[str], tokens: int) -> tuple[list[str], str | None]:
            transcript = transcribe(path)
            answerer = Answerer(model, processor, "true_transcript", None, tokens, PROMPT)
            asked = [path] * len(questions)
            try:
                return [
                    answer.text for answer in answerer.answer(questions, asked, asked, [transcript] * len(asked))
                ], transcript
            except ValueError:  # the language model's context is too short for it
                return [TOO_LONG] * len(questions), transcript

        return call

    found: dict[str, Callable[..., Any]] = {f"hears, L = {length}": hears(length) for length in LENGTHS}
    return found | {f"faster-whisper, {name}": reads(transcribe) for name, transcribe in rivals.items()}


def measure(
    ways: dict[str, Callable[..., Any]], speech: Path, seconds: Sequence[int], repeats: int
) -> Iterator[dict[str, Any]]:
    """Yields for every duration the seconds of every way to an answer, run in turn, and whether it could answer."""
    with tempfile.TemporaryDirectory() as folder:
        for number, duration in enumerate(sorted(seconds)):
            path = str(joined(speech, duration, Path(folder, f"{duration}.flac")))
            runs: dict[str, list[float]] = {name: [] for name in ways}
            answered = dict.fromkeys(ways, True)
            for turn in tqdm(range(repeats + (number == 0)), desc=f"{duration} s", unit="turn", disable=None):
                for name, way in ways.items():
                    start = time.perf_counter()
                    (answer,), _ = way(path, [QUESTION], ANSWER_TOKENS)
                    if turn or number:
                        runs[name].append(time.perf_counter() - start)
                    answered[name] = answer != TOO_LONG
            yield {"seconds": duration, "runs": runs, "answered": answered}


def score(
    ways: dict[str, Callable[..., Any]], corpus: Path, speech: Path, limit: int | None, done: Container[str | None]
) -> Iterator[dict[str, Any]]:
    """Yields the token F1 of every way's answers about recordings of people, and the word errors of transcripts.

    Recordings whose paths are in `done` are left out.
    """
    normalize = whisper_normalizer()
    recordings: dict[str, list[dict[str, Any]]] = {}
    for row in SETS["people"].rows(corpus, speech):
        recordings.setdefault(row["audio"], []).append(row)
    for path, rows in tqdm(list(recordings.items())[:limit], desc="questions", unit="recording", disable=None):
        if path in done:
            continue
        scores = []
        for name, way in ways.items():
            answers, transcript = way(path, [row["question"] for row in rows], 2 * ANSWER_TOKENS)
            f1 = [token_f1(answer, row["answers"]) for answer, row in zip(answers, rows, strict=True)]
            errors = word_errors(normalize(rows[0]["passage"]), normalize(transcript)) if transcript else None
            scores.append({"way": name, "f1": f1, "word_errors": errors})
        yield {"recording": path, "scores": scores}


def report(settings: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """Returns the table of a run: what it was made with, and what `measure` and `score` found."""
    durations = [row for row in results if "runs" in row]
    scores = [score | {"recording": row["recording"]} for row in results if "scores" in row for score in row["scores"]]
    names = list(durations[0]["runs"])
    first = names[0]
    headings = ["way"]
    for row in durations:
        headings += [f"{row['seconds'] // 60} min, s", f"/ {first}"]
    headings += ["token F1, %", "word errors, %"]
    lines = []
    for name in names:
        line = [name]
        for row in durations:
            pairs = zip(row["runs"][name], row["runs"][first], strict=True)
            line += [f"{median(row['runs'][name]):.1f}", f"{median(a / b for a, b in pairs):.1f}"]
            if not row["answered"][name]:
                line[-2] += " (to the transcript, which is too long for the language model)"
        scored = [row for row in scores if row["way"] == name]
        values = [(value, row["recording"]) for row in scored for value in row["f1"]]
        interval = mean_with_interval([value for value, _ in values], [recording for _, recording in values])
        line.append(percent(interval))
        errors = [row["word_errors"] for row in scored if row["word_errors"]]
        line.append(f"{100 * sum(e for e, _ in errors) / sum(n for _, n in errors):.1f}" if errors else "–")
        lines.append(line)
    repeats = settings["repeats"]
    runs = f"{repeats} runs" if repeats > 1 else "one run"
    where = f"On {settings['device']}, {settings['threads']} threads, {settings['dtype']}; {runs} each."
    return f"{where}\n\n{table(headings, lines)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing of the benchmark, and writes its table into the page.

    Raises:
        ValueError: faster-whisper is missing, there is too little speech, or OUTPUT holds results of another run.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, metavar="CORPUS")
    parser.add_argument("--speech", type=Path, required=True, metavar="FOLDER", help="human speech with its manifests")
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--whisper", default="base", help="name or folder for faster-whisper (default: %(default)s)")
    parser.add_argument("--device", help="default: a GPU if there is one, else the CPU")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=int, nargs="+", default=SECONDS, metavar="S")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--limit", type=int, metavar="N", help="questions about the first N recordings only")
    parser.add_argument("--output", type=Path, required=True, metavar="SPEED", help="folder for the results")
    parser.add_argument("--page", type=Path, metavar="FILE", help="Markdown page to write the table into")
    arguments = parser.parse_args(argv)
    device = find_device(arguments.device)
    machine = describe_machine(device, arguments.dtype)
    settings = {name: machine[name] for name in ("device", "threads", "dtype", "torch", "transformers")}
    settings |= {name: getattr(arguments, name) for name in ("model", "whisper", "repeats", "limit")}
    path = arguments.output / "results.jsonl"
    results = begin_journal(path, settings, arguments.output)
    with Journal(path) as journal:

        def note(row: dict[str, Any]) -> None:
            results.append(row)
            journal.append(row)

        rivals: dict[str, Callable[[str], str]] = {name: Whisper(arguments.whisper, device, name) for name in TYPES}
        found = ways(*load_model(arguments.model, device, arguments.dtype), rivals)
        waiting = set(arguments.seconds) - {row.get("seconds") for row in results}
        for row in measure(found, arguments.speech, sorted(waiting), arguments.repeats):
            note(row)
        done = {row.get("recording") for row in results}
        for row in score(found, arguments.corpus, arguments.speech, arguments.limit, done):
            note(row)
    text = report(settings, results)
    print(text)
    if arguments.page:
        page = arguments.page.read_text(encoding="utf-8") if arguments.page.exists() else HEAD
        page = insert_blocks(page, {"speed": text}, str(arguments.page), WRITER)
        arguments.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
