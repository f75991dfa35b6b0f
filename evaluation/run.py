"""Asks a model the questions of a benchmark and scores its answers.

    fastlongspeech evaluate --task qa --data short/qa.jsonl --model checkpoints/fastlongspeech-demo \\
        --compression iterative_fusion --target-length 200 --output results/short-200
    accelerate launch --num_processes 4 -m fastlongspeech evaluate ...

The output folder gets `predictions.jsonl` (every answer with its scores), `verdicts.jsonl` (the judge's replies) and
`summary.json` (the figures with the settings and versions, printed as well). To go on after an interruption, give the
same command again. Given with a judge, it adds the judge's scores.
"""

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from ..app.defaults import MAX_NEW_TOKENS, find_model
from ..app.hosts import find_host
from ..app.loading import find_device, load_model
from ..app.session import Answer
from ..compression_fastlongspeech import COMPRESSIONS
from ..data.tasks import TASKS, Example, QuestionSet, load_questions
from ..recordings_fastlongspeech import EncodedRecordings
from .answering import BY_TRANSCRIPT, METHODS, Answerer
from .chat import Chat
from .journal import Journal, refuse_other
from .judge import judge, read_template
from .longspeech import RUBRIC as TEMPORAL_RUBRIC
from .longspeech import TEMPORAL
from .report import read_predictions, save_predictions, score_predictions, summarize

PACKAGES = ("fastlongspeech", "torch", "transformers", "accelerate", "datasets", "jiwer", "openai", "numpy")
SETTINGS, SUMMARY = "settings.json", "summary.json"
# What the predictions in an output folder depend on.
DATA = ("task", "data", "subset", "audio_root", "limit", "min_seconds", "max_seconds")
SETTING = ("model", "dtype", "compression", "compression_ratio", "target_length", "max_new_tokens", "cascade_prompt")
DECISIVE = (*DATA, *SETTING)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastlongspeech evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, choices=list(TASKS), help="form of the data and kind of score")
    parser.add_argument("--data", required=True, help="manifest, JSON, CSV, datasets folder or Hub name; #split")
    parser.add_argument("--subset", help="configuration of a Hub dataset, or AIR-Bench's task and dataset")
    parser.add_argument("--audio-root", metavar="DIR", help="what recordings are relative to (default: the data's)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows only")
    parser.add_argument("--min-seconds", type=float, default=0, metavar="S", help="skip recordings that are shorter")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="skip recordings that are longer")
    parser.add_argument("--model", help="folder or Hub id (default: the demo model of a checkout)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", help="default: this process's GPU, else the CPU")
    parser.add_argument(
        "--compression",
        default="iterative_fusion",
        choices=[*COMPRESSIONS, "none", *METHODS],
        help="; ".join(f"{name}: {what}" for name, what in METHODS.items()),
    )
    parser.add_argument("--target-length", type=int, metavar="L", help="frames to fuse to (default: the model's)")
    parser.add_argument(
        "--compression-ratio", type=int, metavar="N", help="frames for each summary token (default: the model's)"
    )
    parser.add_argument(
        "--cascade-prompt", metavar="TEXT", help="what is asked about a transcript: {transcript}, {question}"
    )
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help="longest answer")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="questions at a time")
    parser.add_argument("--spellings", metavar="JSON", help="Whisper's normalizer.json, for British spellings")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--judge", action="store_true", help="score the answers 1 to 5 by a language model")
    parser.add_argument("--judge-model", help="its name (default: $OPENAI_MODEL)")
    parser.add_argument(
        "--judge-url", help="OpenAI-compatible endpoint (default: $OPENAI_BASE_URL); its key: $OPENAI_API_KEY"
    )
    parser.add_argument("--judge-template", metavar="FILE", help="prompt with {question}, {reference}, {response}")
    parser.add_argument("--judge-workers", type=int, default=8, metavar="N", help="requests at a time")
    arguments = parser.parse_args(argv)
    for name in ("limit", "batch_size", "max_new_tokens", "judge_workers", "target_length", "compression_ratio"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more, got {value}.")
    method, cascade_prompt = arguments.compression, arguments.cascade_prompt
    if cascade_prompt is not None and not ("{transcript}" in cascade_prompt and "{question}" in cascade_prompt):
        parser.error("--cascade-prompt must hold {transcript} and {question}.")
    if cascade_prompt is not None and method not in BY_TRANSCRIPT:
        parser.error(f"--cascade-prompt has no meaning with --compression {method}; leave it out.")
    if arguments.target_length is not None and method not in (*COMPRESSIONS, "summary"):
        parser.error(f"--target-length has no meaning with --compression {method}; leave it out.")
    if arguments.compression_ratio is not None and method != "summary":
        parser.error(f"--compression-ratio has no meaning with --compression {method}; leave it out.")
    if method == "ctc" and arguments.task != "asr" or "cascade" in method and arguments.task == "asr":
        parser.error(f"--compression {method} is {'not ' if arguments.task == 'asr' else ''}for --task asr.")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `fastlongspeech evaluate`.

    Raises:
        ValueError: an argument, the data or the judge's endpoint can't be used.
    """
    arguments = parse_arguments(argv)
    arguments.model = find_model(arguments.model)
    state = PartialState(cpu=arguments.device == "cpu" or not torch.cuda.is_available())
    benchmark = load_questions(*(getattr(arguments, name) for name in DATA))
    chat, template = find_judge(arguments, benchmark)
    predict(arguments, benchmark, state)
    state.destroy_process_group()  # nobody waits while the main process scores
    if state.is_main_process:
        print(score(arguments, benchmark, chat, template))


def find_judge(arguments: argparse.Namespace, benchmark: QuestionSet) -> tuple[Chat | None, str]:
    """Returns the judge that `--judge` asks for and its prompt; None without.

    Raises:
        ValueError: the answers are no free ones, or the judge's arguments can't be used.
    """
    if not arguments.judge:
        return None, ""
    if benchmark.metric not in ("answer", TEMPORAL):
        raise ValueError(f"--judge is for free answers; the rows of {arguments.data} have others; leave it out.")
    chat = Chat(arguments.judge_model, arguments.judge_url)
    if benchmark.metric == TEMPORAL and arguments.judge_template is None:
        return chat, TEMPORAL_RUBRIC
    return chat, read_template(arguments.judge_template)


def load_wanted(arguments: argparse.Namespace, device: str) -> tuple[Any, Any]:
    """Returns the model and the processor that `--model`, `--dtype` and `--compression` ask for."""
    config = None
    if arguments.compression == "ntk_rope":
        config = find_host(arguments.model).config.from_pretrained(arguments.model).with_ntk_rope()
    return load_model(arguments.model, device, arguments.dtype, config)


def predict(
    arguments: argparse.Namespace,
    benchmark: QuestionSet,
    state: Any,
    load: Callable[[argparse.Namespace, str], tuple[Any, Any]] = load_wanted,
    frames: dict[str, EncodedRecordings] | None = None,
) -> None:
    """Answers the questions that have no prediction in the output folder yet.

    Every process of `state` takes every so many batches and writes a file of its own.

    Args:
        arguments: as `parse_arguments` returns them.
        benchmark: the questions.
        state: the processes, an `accelerate.PartialState`.
        load: returns the model and the processor; called where a question waits.
        frames: see `Answerer`.
    """
    output = arguments.output
    decisive = {name: getattr(arguments, name) for name in DECISIVE}
    if state.is_main_process:
        _keep_settings(output, decisive)
    done = {row["row"] for row in read_predictions(output, benchmark)}
    state.wait_for_everyone()  # no process writes before all have read

    waiting = [example for example in benchmark.examples if example.row not in done]
    if waiting:
        device = find_device(arguments.device or str(state.device))
        model, processor = load(arguments, device)
        answerer = Answerer(
            model,
            processor,
            arguments.compression,
            arguments.target_length,
            arguments.max_new_tokens,
            arguments.cascade_prompt,
            frames,
            arguments.compression_ratio,
        )
        examples = benchmark.examples
        answerer.prepare([example.question for example in examples], [example.duration for example in examples])
        if state.is_main_process:
            run = decisive | {
                "target_length": answerer.target_length,
                "cascade_prompt": answerer.cascade_prompt,
                "batch_size": arguments.batch_size,
                "processes": state.num_processes,
                "device": device,
                "dtype": str(model.dtype),
                "generation_config": model.generation_config.to_diff_dict(),
            }
            _write_json(output / SETTINGS, {"arguments": decisive, "run": run, "versions": versions()})
        batches = make_batches(waiting, arguments.batch_size)[state.process_index :: state.num_processes]
        total = sum(map(len, batches))
        with (
            Journal(output / f"predictions.part{state.process_index}.jsonl") as journal,
            tqdm(desc="answering", total=total, unit="question", disable=not state.is_main_process) as bar,
        ):
            for batch in batches:
                answers = answer_examples(answerer, benchmark, batch)
                for example, (text, ended) in zip(batch, answers, strict=True):
                    journal.append(_described(example) | {"prediction": text, "ended": ended})
                bar.update(len(batch))
    state.wait_for_everyone()


def score(arguments: argparse.Namespace, benchmark: QuestionSet, chat: Chat | None = None, template: str = "") -> str:
    """Scores the predictions in the output folder, writes `summary.json` and returns what it holds.

    Args:
        arguments: as `parse_arguments` returns them.
        benchmark: the questions, all of which have a prediction.
        chat, template: the judge and its prompt; without, no judge is asked.
    """
    settings = json.loads((arguments.output / SETTINGS).read_text(encoding="utf-8"))
    rows = read_predictions(arguments.output, benchmark)
    score_predictions(rows, benchmark.metric, arguments.spellings)
    settings["run"]["spellings"] = arguments.spellings
    for row in rows:
        row.pop("judge", None)  # of an earlier run of the command
    if chat is not None:
        verdicts = arguments.output / "verdicts.jsonl"
        scores = judge(rows, chat, template, verdicts, arguments.judge_workers)
        for row, value in zip(rows, scores, strict=True):
            row["judge"] = value
        settings["run"] |= {"judge_model": chat.model, "judge_prompt": template}
    save_predictions(arguments.output, rows)
    text = json.dumps(summarize(rows, benchmark) | settings, indent=1, ensure_ascii=False)
    (arguments.output / SUMMARY).write_text(text + "\n", encoding="utf-8")
    return text


def answer_examples(answerer: Answerer, benchmark: QuestionSet, batch: Sequence[Example]) -> list[Answer]:
    """Returns the answers to examples of a benchmark, in one batch."""
    return answerer.answer(
        [example.question for example in batch],
        [example.recording for example in batch],
        [benchmark.audio(example) for example in batch],
        [example.passage for example in batch],
    )


def make_batches(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Returns the examples in batches, the longest recordings first.

    The questions about a recording share a batch unless they are more than `size`.
    """
    recordings: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda example: -example.duration):
        recordings.setdefault(example.recording, []).append(example)
    batches: list[list[Example]] = []
    for group in recordings.values():
        if batches and len(batches[-1]) + len(group) <= size:
            batches[-1] += group
        else:
            batches += [group[first : first + size] for first in range(0, len(group), size)]
    return batches


def _described(example: Example) -> dict[str, Any]:
    """Returns what a prediction repeats of its example."""
    row = {
        "row": example.row,
        "recording": example.recording,
        "duration": round(example.duration, 3),
        "question": example.question,
        "answers": example.answers,
    }
    return row | ({"choices": example.choices} if example.choices else {}) | example.notes


def _keep_settings(output: Path, decisive: dict[str, Any]) -> None:
    """Notes what the predictions depend on, or refuses a folder whose predictions were made otherwise."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / SETTINGS
    if not path.exists():
        _write_json(path, {"arguments": decisive, "run": decisive, "versions": versions()})
        return
    refuse_other(json.loads(path.read_text(encoding="utf-8"))["arguments"], decisive, output)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a figure may depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
