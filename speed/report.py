"""Writes docs/performance.md and its plots from the files in speed/results/, each table under its command.

python -m fastlongspeech.speed.report
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402  # after the choice of what it draws with

from fastlongspeech.app.markdown import table  # noqa: E402

from . import encoder, flops, frontend, fusion, prefill, recording, trials  # noqa: E402
from .common import FRAMES_PER_SECOND, RESULTS  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs"
SECTIONS: dict[str, tuple[str, Any]] = {
    "flops": ("Operations, counted", flops),
    "fusion": ("Density and fusion", fusion),
    "encoder": ("Encoder", encoder),
    "prefill": ("Time to the first token", prefill),
    "frontend": ("Decoding and mel features", frontend),
    "recording": ("From a file to the first token", recording),
    "trials": ("What was tried on the encoder", trials),
}
WITH_GOALS: dict[str, Any] = {"fusion": fusion, "prefill": prefill, "recording": recording}
HEAD = """# Cost and speed

`python -m fastlongspeech.speed.report` writes this page from the files in `speed/results/`. Each table stands under
the command that measured it. In a clean clone, `make test` makes the environment for these commands in `.venv`;
activate it with `. .venv/bin/activate`. `--device` names another device, and `--quick` shows in seconds that a script
works.

This says what a recording of yours costs, before it is run:

```bash
fastlongspeech cost interview.mp3 --target-length 400 --model Qwen/Qwen2-Audio-7B-Instruct
```

Unless a section says otherwise, times are medians over repeats after one run to warm up, and ratios are medians over
pairs that ran in turn. Where the longest run took over 1.5 times as long as the shortest, the range stands beside the
median; ratios of such runs say little. Memory is the peak of a run beyond what was held before it. "Every frame" is
what NTK-RoPE reads; its stretched positions cost nothing by themselves.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (default: speed/results)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write to (default: docs)")
    arguments = parser.parse_args(argv)
    arguments.docs.mkdir(parents=True, exist_ok=True)
    if not any(arguments.results.glob("*.json")):
        raise SystemExit(f"--results {arguments.results} holds no results; run a benchmark first.")
    counted = arguments.results / "flops.json"
    if not counted.exists():  # not in git: unlike a measurement, every machine counts the same
        flops.main(["--output", str(counted)])
    found = [(file.stem, json.loads(file.read_text())) for file in sorted(arguments.results.glob("*.json"))]
    parts = [HEAD.strip()]
    goals = [
        [goal.figure, place(results), goal.wanted, goal.measured, "yes" if goal.met else "no"]
        for _, results in found
        if results["benchmark"] in WITH_GOALS
        for goal in WITH_GOALS[results["benchmark"]].goals(results)
    ]
    if goals:
        parts += ["## What was to be reached", table(["figure", "at", "wanted", "measured", "met"], goals)]
    if missing := not_measured([results for _, results in found]):
        parts.append(f"Not measured yet: {'; '.join(missing)}.")
    for name, (title, module) in SECTIONS.items():
        of_section = [(stem, results) for stem, results in found if results["benchmark"] == name]
        if of_section:
            parts += [f"## {title}", explanation(module)]
        for stem, results in of_section:
            parts += [f"```bash\n{results['command']}\n```", machine(results["machine"]), module.report(results)]
            if name in PLOTTED:
                draw(title, *PLOTTED[name](results), arguments.docs / f"{stem}.svg")
                parts.append(f"![Seconds and memory against duration]({stem}.svg)")
    (arguments.docs / "performance.md").write_text("\n\n".join(parts) + "\n")


def not_measured(found: Sequence[dict[str, Any]]) -> list[str]:
    """Returns which benchmarks have no results on a CPU, and which on a GPU."""
    there = {(results["benchmark"], "--device cpu" in results["command"]) for results in found}
    missing = []
    for place, on_cpu in (("on a CPU", True), ("on a GPU", False)):
        names = [name for name in SECTIONS if name != "flops" and (name, on_cpu) not in there]
        missing += [f"{place} {', '.join(names)}"] if names else []
    return missing


def explanation(module: Any) -> str:
    """Returns what the docstring of a benchmark says, save its command."""
    return "\n\n".join(part for part in module.__doc__.strip().split("\n\n") if not part.startswith("    "))


def place(results: dict[str, Any]) -> str:
    """Returns the device and the sizes of a benchmark."""
    return f"{results['machine']['device']}, {results['model']}, {results['machine']['dtype']}"


def machine(facts: dict[str, Any]) -> str:
    """Returns a sentence about where a benchmark ran."""
    versions = f"torch {facts['torch']}, transformers {facts['transformers']}"
    if "device" not in facts:
        return f"Counted with {versions}."
    kept = ", freed memory kept" if facts.get("keeps_freed_memory") else ""
    return (
        f"On {facts['device']} ({facts['dtype']}; {facts['cores']} cores, {facts['threads']} threads{kept}), load "
        f"{facts['load_before']} before, with {versions}, Python {facts['python']}, on {facts['date']}."
    )


def by_duration(results: dict[str, Any]) -> tuple[dict[str, list], dict[str, list]]:
    """Returns the seconds and the MB of every call against the seconds of a single recording."""
    seconds: dict[str, list] = {}
    memory: dict[str, list] = {}
    for row in results["rows"]:
        case, calls = row["case"], {name: call for name, call in row["calls"].items() if "seconds" in call}
        calls.pop(fusion.ENCODER, None)  # of one window, however long the recording is
        if case.get("batch", 1) == 1:
            duration = case["seconds"] if "seconds" in case else case["frames"] / FRAMES_PER_SECOND
            for name, call in calls.items():
                seconds.setdefault(name, []).append((duration, call["seconds"]))
                if call["bytes"]:
                    memory.setdefault(name, []).append((duration, call["bytes"] / 1e6))
    return seconds, memory


PLOTTED = dict.fromkeys(("fusion", "encoder", "prefill", "frontend"), by_duration) | {"recording": recording.series}


def draw(title: str, seconds: dict[str, list], memory: dict[str, list], path: Path) -> None:
    """Writes a plot of seconds and of MB against duration, both logarithmic, a line for every method or part."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for axis, lines, label in ((axes[0], seconds, "s"), (axes[1], memory, "MB")):
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axis.set(xscale="log", yscale="log", xlabel="recording, s", ylabel=label)
        axis.grid(True, which="both", linewidth=0.3)
        axis.legend(fontsize=8)
    axes[0].set_title(f"{title}: time")
    axes[1].set_title("Peak memory beyond weights and what is given")
    figure.tight_layout()
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
