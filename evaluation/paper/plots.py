"""Plots of the paper's comparisons: against L, against duration, and against the place of a fact."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402  # after the choice of what it draws with
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402

from .recipe import (  # noqa: E402
    AT_LENGTHS,
    BASELINE,
    CASCADES,
    CTC,
    NTK_ROPE,
    OURS,
    POOLING,
    RANDOM,
    SIMILAR,
    WINDOW,
    Method,
)
from .results import METRICS, Results, Rows, mean_of  # noqa: E402

DURATIONS = (0, 60, 120, 240, 480, 1000)  # seconds
FIFTHS = (0, 0.2, 0.4, 0.6, 0.8, 1)  # of a recording
COLORS = {
    "iterative_fusion": "tab:red",
    "random": "tab:gray",
    "average_pooling": "tab:blue",
    "most_similar": "tab:green",
    "adjacent_merging": "tab:orange",
    "ntk_rope": "tab:purple",
    "cascade": "tab:brown",
    "ctc_cascade": "tab:olive",
}
LINES = {"plain": "--", "stage1": ":"}  # the others, trained with what they hear through: solid
# Without L, or at the same L for all.
LONG = (OURS, NTK_ROPE, POOLING, SIMILAR, RANDOM, *CASCADES[2:])


def binned(rows: Rows | None, field: str, edges: Sequence[float]) -> list[Rows]:
    """Returns predictions by `"duration"` in seconds or by the `"place"` of the fact, 0 to 1, between edges.

    Where a prediction doesn't say when its fact is said, it has no place.
    """
    bins: list[Rows] = [[] for _ in edges[1:]]
    for row in rows or []:
        if field == "place" and "time" not in row:
            continue
        value = row["duration"] if field == "duration" else row["time"] / row["duration"]
        number = sum(value > edge for edge in edges[1:-1])
        bins[number].append(row)
    return bins


def draw(axis: pyplot.Axes, method: Method, points: Sequence[tuple[float, Rows | None]], metric: str) -> None:
    """Draws the line of a method through the means of predictions, with their intervals."""
    found = [(x, interval) for x, rows in points if (interval := mean_of(rows, metric)) is not None]
    if not found:
        return
    values = [interval["value"] for _, interval in found]
    errors = [
        [max(0.0, interval["value"] - interval["low"]) for _, interval in found],
        [max(0.0, interval["high"] - interval["value"]) for _, interval in found],
    ]
    axis.errorbar(
        [x for x, _ in found],
        values,
        errors,
        label=method.name,
        color=COLORS[method.compression],
        ecolor=(COLORS[method.compression], 1 if method == OURS else 0.4),
        linestyle=LINES.get(method.model, "-"),
        linewidth=2.2 if method == OURS else 1.3,
        marker="o",
        markersize=4,
        elinewidth=0.7,
        capsize=2,
    )


def plot_lengths(results: Results, path: Path) -> bool:
    """Draws scores, word errors and costs against L; False where there is nothing to draw."""
    names = results.benchmarks(False)
    lengths = sorted(results.recipe.lengths)
    if not any(condition.benchmark in names for condition in results.found):
        return False
    columns = min(2, len(names) + 1)
    lines = -(-(len(names) + 1) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(6.2 * columns, 4.2 * lines), squeeze=False)
    axes = list(grid.flat)
    for axis, name in zip(axes, names, strict=False):
        metric = results.metric(name)
        for number, method in enumerate(AT_LENGTHS):
            shift = 1 + 0.012 * (number - len(AT_LENGTHS) // 2)  # so that intervals don't hide one another
            draw(axis, method, [(n * shift, results.rows(name, method, n)) for n in lengths], metric)
        for method, style in ((BASELINE, (0, (1, 3))), (CTC, (0, (5, 5)))):
            interval = mean_of(results.rows(name, method), metric)
            if interval is not None:
                axis.axhline(interval["value"], color="black", linewidth=1, linestyle=style, label=method.name)
        axis.set(title=results.title(name), ylabel=METRICS[metric][0])
        if metric == "word_errors":
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
    cost, (sign, size) = axes[len(names)], results.unit(names[0])
    counted = {method.compression: method for method in reversed(AT_LENGTHS)}
    for compression, method in reversed(counted.items()):
        flops = [(n, results.flops(names[0], method, n)) for n in lengths]
        points = [(n, value / size) for n, value in flops if value is not None]
        cost.plot(*zip(*points, strict=True), marker="o", markersize=4, color=COLORS[compression])
    cost.set(title=f"Cost, counted: {results.title(names[0])}", ylabel=f"{sign} to the first token")
    cost.set_ylim(bottom=0)
    for axis in axes[: len(names) + 1]:
        axis.set(xlabel="L, frames a recording is shortened to", xscale="log")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(True, which="both", linewidth=0.3)
    for axis in axes[len(names) + 1 :]:
        axis.axis("off")
    save(figure, axes[: len(names)], path)
    return True


def plot_long(results: Results, name: str, path: Path) -> bool:
    """Draws the scores of long recordings against duration and the place of the fact; False: nothing to draw."""
    metric = results.metric(name)
    found = {method: rows for method in LONG if (rows := results.rows(name, method, WINDOW))}
    placed = any("time" in row for rows in found.values() for row in rows)
    if not found:
        return False
    figure, grid = pyplot.subplots(1, 1 + placed, figsize=(6.2 * (1 + placed), 4.6), squeeze=False)
    axes = list(grid.flat)
    for number, (method, rows) in enumerate(found.items()):
        shift = number - len(found) // 2
        durations = [
            (mean(row["duration"] for row in part) * (1 + 0.012 * shift), part)
            for part in binned(rows, "duration", DURATIONS)
            if part
        ]
        draw(axes[0], method, durations, metric)
        if placed:
            middles = [(low + high) / 2 + 0.008 * shift for low, high in zip(FIFTHS, FIFTHS[1:], strict=False)]
            draw(axes[1], method, list(zip(middles, binned(rows, "place", FIFTHS), strict=True)), metric)
    ticks = [30, 60, 120, 240, 480, 1000]
    axes[0].set(xlabel="duration of the recording, s", xscale="log", ylabel=METRICS[metric][0])
    axes[0].set_xticks(ticks, [str(tick) for tick in ticks])
    axes[0].xaxis.set_minor_locator(NullLocator())
    if placed:
        axes[1].set(xlabel="where the fact is said, part of the recording", xlim=(0, 1), ylabel=METRICS[metric][0])
    for axis in axes:
        axis.grid(True, linewidth=0.3)
    save(figure, axes, path)
    return True


def save(figure: pyplot.Figure, axes: Sequence[pyplot.Axes], path: Path) -> None:
    """Writes a figure with one legend below for all axes; the same figures give the same file."""
    labels = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    names = [method.name for method in (*AT_LENGTHS, *LONG, BASELINE, CTC) if method.name in labels]
    handles = {name: labels[name] for name in names}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=9, handlelength=3.5)
    figure.set_layout_engine("constrained")
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
