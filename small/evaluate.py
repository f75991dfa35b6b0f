"""What the small model reaches on speech it has never heard, and writes the page with the figures.

    python -m fastlongspeech.small.evaluate CORPUS --speech FOLDER --model MODEL --output FOLDER
    ... --page docs/results-small.md

CORPUS is what `small.corpus` wrote, `--speech` the folder of human speech that it read. No speaker, text or question
of these sets was trained on. Every set under every method is one `fastlongspeech evaluate` with a folder of its own in
OUTPUT, so that a stopped run goes on where it was; the frames of a recording are made once for all methods.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..data.tasks import load_questions
from ..evaluation.paper.run import Models
from ..evaluation.run import DATA, SUMMARY, parse_arguments, predict, score
from .report import SHORT, write_page
from .tasks import MAN_OR_WOMAN

LENGTHS = (750, 400, 200, 100, 50, 25, 12)
PROMPT = "{transcript}\n{question}"  # how the language model has learnt to read
CLIP_SECONDS = (10, 30)  # of the clips whose transcripts by the language model are compared with the CTC decoder's

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Set:
    """Recordings with questions or transcripts.

    Attributes:
        title: as the page names it.
        task: of `fastlongspeech evaluate`.
        rows: returns its rows from the folders of the corpus and of human speech, `audio` an absolute path.
    """

    title: str
    task: str
    rows: Callable[[Path, Path], Rows]


def read_rows(manifest: Path, wanted: Callable[[dict[str, Any]], bool] = lambda row: True) -> Rows:
    """Returns the wanted rows of a manifest, with absolute paths.

    Raises:
        ValueError: there is no such row.
    """
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    found = [row | {"audio": os.path.abspath(manifest.parent / row["audio"])} for row in rows if wanted(row)]
    if not found:
        raise ValueError(f"{manifest} has none of the rows that are to be scored; make the corpus complete first.")
    return found


def human_clips(source: str) -> Callable[[Path, Path], Rows]:
    """Returns what reads the test clips of a source of human speech."""
    return lambda _, speech: read_rows(speech / "test.jsonl", lambda row: row["audio"].startswith(source))


def questions(task: str) -> Callable[[Path, Path], Rows]:
    """Returns what reads one kind of questions about passages, each with the text of its passage."""

    def read(corpus: Path, _: Path) -> Rows:
        said = {row["audio"]: row["text"] for row in read_rows(corpus / "test.jsonl")}
        rows = read_rows(corpus / "tasks-test.jsonl", lambda row: row["task"] == task)
        return [row | {"passage": said[row["audio"]]} for row in rows]

    return read


def voices(corpus: Path, _: Path) -> Rows:
    """Returns the questions whether a man or a woman speaks."""
    rows = read_rows(corpus / "tasks-test.jsonl", lambda row: row["task"] == "gender")
    return [row | {"choices": list(MAN_OR_WOMAN.values())} for row in rows]


def kokoro_clips(corpus: Path, _: Path) -> Rows:
    """Returns the single sentences by natural voices that were never trained on."""
    return read_rows(corpus / "test.jsonl", lambda row: "test-clips" in row["audio"])


SETS = {
    "librispeech": Set("LibriSpeech test-other, 4 readers", "asr", human_clips("resemblyzer")),
    "librispeech-26": Set("LibriSpeech, reader 26", "asr", human_clips("librispeech")),
    "ljspeech": Set("LJSpeech", "asr", human_clips("ljspeech")),
    "hifitts": Set("Hi-Fi TTS, reader 6097", "asr", human_clips("hifitts")),
    "accented": Set("speechocean762, non-native", "asr", lambda _, speech: read_rows(speech / "test_accented.jsonl")),
    "kokoro": Set("natural voices never trained on", "asr", kokoro_clips),
    "passages": Set("passages by natural voices", "qa", questions("question")),
    "people": Set("recordings of people", "qa", lambda corpus, _: read_rows(corpus / "tasks-human.jsonl")),
    "not-said": Set("questions that the passage does not answer", "qa", questions("not_said")),
    "voices": Set("man or woman", "choice", voices),
}


def conditions() -> Iterator[tuple[str, str, int | None]]:
    """Yields set, method and L of every run of `fastlongspeech evaluate`, the most telling first."""
    for name, asked in SETS.items():
        if asked.task == "asr":
            yield name, "ctc", None
    for name in ("passages", "people"):
        yield name, "true_transcript", None
        for length in (750, 400):
            yield name, "iterative_fusion", length
    for name, asked in SETS.items():
        if asked.task == "asr" and name not in SHORT:
            yield name, "iterative_fusion", 400
    for name in ("passages", "people"):
        for method in ("none", "ctc_cascade"):
            yield name, method, None
        for length in LENGTHS[2:]:
            yield name, "iterative_fusion", length
    for name in ("not-said", "voices"):
        yield name, "iterative_fusion", 400


def folder(output: Path, name: str, method: str, length: int | None) -> Path:
    """Returns where the predictions of a condition are."""
    return output / name / (method if length is None else f"{method}-{length}")


def command(arguments: argparse.Namespace, name: str, method: str, length: int | None) -> list[str]:
    """Returns the arguments of `fastlongspeech evaluate` for a condition; writes its data."""
    asked = SETS[name]
    data = arguments.output / f"{name}.jsonl"
    rows = asked.rows(arguments.corpus, arguments.speech)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(text, encoding="utf-8")
    words = ["--task", asked.task, "--data", str(data), "--model", arguments.model, "--compression", method]
    words += ["--output", str(folder(arguments.output, name, method, length)), "--batch-size", "16"]
    words += ["--dtype", arguments.dtype]
    if length is not None:
        words += ["--target-length", str(length)]
    if asked.task == "asr" and method != "ctc":
        low, high = CLIP_SECONDS
        words += ["--min-seconds", str(low), "--max-seconds", str(high), "--max-new-tokens", "200"]
    elif asked.task != "asr":
        words += ["--max-new-tokens", "40"]
    if method in ("true_transcript", "ctc_cascade"):
        words += ["--cascade-prompt", PROMPT]
    return words + (["--limit", str(arguments.limit)] if arguments.limit else [])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every condition that is not complete, then writes the page.

    Raises:
        ValueError: a manifest lacks rows, or a folder holds predictions of other settings.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, metavar="CORPUS")
    parser.add_argument("--speech", type=Path, required=True, metavar="FOLDER", help="human speech with its manifests")
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for predictions and scores")
    parser.add_argument("--page", type=Path, metavar="FILE", help="Markdown page to write the tables into")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows of every set, to see that it works")
    arguments = parser.parse_args(argv)
    state = PartialState(cpu=not torch.cuda.is_available())
    models = Models()
    wanted = list(conditions())
    for number, (name, method, length) in enumerate(wanted, 1):
        options = parse_arguments(command(arguments, name, method, length))
        if (options.output / SUMMARY).exists():
            continue
        if state.is_main_process:
            print(f"{number} of {len(wanted)}: {options.output}", file=sys.stderr, flush=True)
        benchmark = load_questions(*(getattr(options, field) for field in DATA))
        predict(options, benchmark, state, models.load, models.frames)
        if state.is_main_process:
            score(options, benchmark)
    if arguments.page and state.is_main_process:
        titles = {name: (asked.title, asked.task) for name, asked in SETS.items()}
        write_page(arguments.page, arguments.output, titles, LENGTHS)


if __name__ == "__main__":
    main()
