"""The paper's comparisons in one run: trains the rivals, asks every model under every condition, writes the tables.

    python -m fastlongspeech.evaluation.paper evaluation/recipes/paper-demo.yaml
    python -m fastlongspeech.evaluation.paper RECIPE --steps train evaluate --models plain most_similar
    python -m fastlongspeech.evaluation.paper RECIPE --steps report
    python -m fastlongspeech.evaluation.paper RECIPE --commands

Steps:

- `train`: stage 2 for each rival that has no model yet;
- `evaluate`: the questions of every condition, the most important conditions first;
- `time`: seconds from file to answer, on an idle machine;
- `report`: the page and its plots, from the conditions that are complete.

A condition is one `fastlongspeech evaluate` command; `--commands` prints them all. A step that was stopped goes on
where it was. `--models` takes some models only, so that several processes can share the work. `--quick` takes a few
questions and a step or two of training, into OUTPUT/quick.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from ...app.loading import find_device
from ...data.tasks import Example, QuestionSet, load_questions
from ...recordings_fastlongspeech import EncodedRecordings
from ..answering import Answerer
from ..journal import Journal, read_journal
from ..run import DATA, SUMMARY, find_judge, load_wanted, parse_arguments, predict, score
from .recipe import MODELS, NTK_ROPE, OURS, RIVALS, Recipe
from .report import write_report
from .results import SECONDS

STEPS = ("train", "evaluate", "time", "report")
TIMED, QUICK_TIMED = 16, 2  # recordings


class Models:
    """Loads one model at a time; keeps the frames of recordings as long as the models have the same encoder."""

    def __init__(self) -> None:
        self.frames: dict[str, EncodedRecordings] = {}
        self._encoder = ""
        self._loaded: Any = None
        self._wanted: Any = None

    def load(self, arguments: argparse.Namespace, device: str) -> tuple[Any, Any]:
        """Returns the model and the processor that the arguments of `evaluate` ask for."""
        wanted = arguments.model, arguments.dtype, arguments.compression == "ntk_rope", device
        if wanted != self._wanted:
            self._loaded = None  # two might be too large
            self._wanted, self._loaded = wanted, load_wanted(arguments, device)
            model = self._loaded[0]
            encoder = f"{model.dtype} {model.fingerprint()}"
            if encoder != self._encoder:
                self.frames.clear()
                self._encoder = encoder
        return self._loaded


def train(recipe: Recipe, names: Sequence[str]) -> None:
    """Trains the rivals that are not there."""
    from ...train import dct  # the extra `train`

    for name, compression in RIVALS.items():
        if name in names and not (Path(folder := recipe.models[name]) / "config.json").exists():
            dct.main([*recipe.training, "--compression", compression, "--output_dir", folder])


def evaluate(recipe: Recipe, names: Sequence[str], models: Models) -> None:
    """Answers and scores the questions of every condition of these models.

    Raises:
        ValueError: a rival is not there, or a benchmark or the judge can't be used.
    """
    for name in RIVALS:
        if name in names and not (Path(recipe.models[name]) / "config.json").exists():
            raise ValueError(f"{recipe.models[name]} holds no model; train it with --steps train --models {name}.")
    state = PartialState(cpu=not torch.cuda.is_available())
    conditions = [condition for condition in recipe.conditions() if condition.model in names]
    opened: dict[str, tuple[QuestionSet, Any]] = {}
    for number, condition in enumerate(conditions, 1):
        arguments = parse_arguments(recipe.command(condition))
        if condition.benchmark not in opened:
            benchmark = load_questions(*(getattr(arguments, name) for name in DATA))
            opened[condition.benchmark] = benchmark, find_judge(arguments, benchmark)
        benchmark, _ = opened[condition.benchmark]
        if state.is_main_process:
            print(f"{number} of {len(conditions)}: {arguments.output}", file=sys.stderr, flush=True)
        predict(arguments, benchmark, state, models.load, models.frames)
        scored = (arguments.output / SUMMARY).exists() and not any(arguments.output.glob("predictions.part*"))
        if state.is_main_process and not scored:
            score(arguments, benchmark)
    state.destroy_process_group()  # nobody waits for the judge
    for condition in conditions if state.is_main_process else []:
        arguments = parse_arguments(recipe.command(condition))
        benchmark, (chat, template) = opened[condition.benchmark]
        run = json.loads((arguments.output / SUMMARY).read_text())["run"]
        if chat is not None and (run.get("judge_model"), run.get("judge_prompt")) != (chat.model, template):
            score(arguments, benchmark, chat, template)


def measure(recipe: Recipe, names: Sequence[str], models: Models) -> None:
    """Measures seconds from a recording's file to its answer, one at a time, for ours and NTK-RoPE.

    The recordings are spread evenly over those of a long benchmark, sorted by duration; their mean stands for all.
    """
    device = find_device(None)
    for name in filter(recipe.is_long, recipe.benchmarks):
        path = recipe.output / name / SECONDS
        done = {(row["model"], row["compression"], row["row"]) for row in read_journal(path)}
        for condition in (recipe.condition(name, method) for method in (OURS, NTK_ROPE)):
            if condition.model not in names:
                continue
            arguments = parse_arguments(recipe.command(condition))
            benchmark = load_questions(*(getattr(arguments, field) for field in DATA))
            key = condition.model, condition.compression
            waiting = [example for example in spread(benchmark, recipe.quick) if (*key, example.row) not in done]
            if not waiting:
                continue
            model, processor = models.load(arguments, device)
            answerer = Answerer(model, processor, key[1], condition.length, arguments.max_new_tokens)
            examples = benchmark.examples
            answerer.prepare([example.question for example in examples], [example.duration for example in examples])
            answerer.answer([waiting[0].question], ["to warm up"], [benchmark.audio(waiting[0])])
            with Journal(path) as journal:
                for example in tqdm(waiting, desc=f"timing {key[1]}", unit="recording"):
                    load, start = os.getloadavg()[0], time.perf_counter()
                    answerer.answer([example.question], [example.recording], [benchmark.audio(example)])
                    seconds = time.perf_counter() - start
                    row = {"model": key[0], "compression": key[1], "row": example.row, "recording": example.recording}
                    row |= {"duration": example.duration, "seconds": seconds, "load": load, "device": device}
                    journal.append(row | {"threads": torch.get_num_threads()})


def spread(benchmark: QuestionSet, quick: bool) -> list[Example]:
    """Returns the first question about each of `TIMED` recordings, evenly spread over the durations."""
    firsts = {example.recording: example for example in reversed(benchmark.examples)}
    ordered = sorted(firsts.values(), key=lambda example: example.duration)
    count = min(len(ordered), QUICK_TIMED if quick else TIMED)
    return [ordered[(2 * number + 1) * len(ordered) // (2 * count)] for number in range(count)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file: models, benchmarks, lengths, and where everything goes")
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS, metavar="STEP", help=f"of {STEPS}")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help="of the recipe (default: all)")
    parser.add_argument("--commands", action="store_true", help="print the commands of the conditions, and do no more")
    parser.add_argument("--quick", action="store_true", help="a few questions, to see that everything works")
    arguments = parser.parse_args(argv)
    recipe = Recipe.read(arguments.recipe, arguments.quick)
    names = arguments.models or list(recipe.models)
    for name in names:
        if name not in recipe.models:
            parser.error(f"--models {name} is not in {arguments.recipe}; pass models of {', '.join(recipe.models)}.")
    if arguments.commands:
        for condition in recipe.conditions():
            if condition.model in names:
                print(shlex.join(["fastlongspeech", "evaluate", *recipe.command(condition)]))
        return
    models, state = Models(), PartialState(cpu=not torch.cuda.is_available())
    if "train" in arguments.steps:
        train(recipe, names)
        state.wait_for_everyone()  # until the main process has written the last rival
    if "evaluate" in arguments.steps:
        evaluate(recipe, names, models)
    if "time" in arguments.steps and state.is_main_process:
        measure(recipe, names, models)
    if "report" in arguments.steps and state.is_main_process:
        write_report(recipe)
