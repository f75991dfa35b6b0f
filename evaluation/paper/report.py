"""The page of the paper's comparisons: our figures beside the paper's, in tables and plots.

Only the blocks between the markers are written; all other text on the page is kept. A dash is not measured yet.
"""

from collections import Counter
from collections.abc import Iterable
from shlex import join
from statistics import mean
from textwrap import fill

from ...app.cost import TEXT_TOKENS
from ...app.markdown import insert_blocks, table
from ..scoring import mean_with_interval
from .plots import DURATIONS, FIFTHS, binned, plot_lengths, plot_long
from .recipe import (
    AT_LENGTHS,
    BASELINE,
    CASCADES,
    CTC,
    MERGING,
    MODELS,
    NTK_ROPE,
    ONE_STEP,
    OURS,
    PLAIN_FUSION,
    POOLING,
    POOLING_TRAINED,
    RANDOM,
    RIVALS,
    SIMILAR,
    SIMILAR_TRAINED,
    STAGE1,
    UNIFORM,
    WINDOW,
    Method,
    Recipe,
)
from .results import DASH, METRICS, Results, Rows, cell, difference

HEAD = """# The paper's tables, again

## What came out differently

<!-- Written by hand, like all that stands outside the blocks between markers, which evaluation/paper writes. -->
"""
PAPER = "paper: score, 1 to 5"
# The paper's figures; its scores are those of a judge, 1 to 5.
TABLE_1 = {RANDOM: 2.54, SIMILAR: 3.08, POOLING: 3.10, NTK_ROPE: 3.44, OURS: 3.55}
ALL_LONG = f"All compressions shorten the recordings to L = {WINDOW} frames."
BEYOND_TABLE_1 = (MERGING, PLAIN_FUSION, POOLING_TRAINED, SIMILAR_TRAINED, STAGE1, *CASCADES)
TABLE_2 = {
    "FastLongSpeech": (OURS, 3.55),
    "w/o DCT: plain fine-tune": (PLAIN_FUSION, 3.33),
    "w/o iterative fusion: one round": (ONE_STEP, 3.41),
    "w/o content density: plain means": (UNIFORM, 3.28),
}
Costs = dict[tuple[Method, int], tuple[float, float]]
TABLE_3: Costs = {
    (BASELINE, WINDOW): (3.73, 9.79),
    (OURS, 400): (3.80, 8.54),
    (OURS, 200): (3.87, 5.64),
    (OURS, 100): (3.71, 4.17),
}
TABLE_4 = {NTK_ROPE: (3.44, 61.21, 4.80), OURS: (3.55, 26.44, 1.47)}
TABLE_5 = {
    (BASELINE, WINDOW): (3.85, 6.70, 13.71),
    (OURS, 750): (4.04, 7.02, 11.76),
    (OURS, 400): (4.08, 7.17, 11.77),
    (OURS, 200): (4.36, 7.40, 12.70),
    (OURS, 100): (27.12, 24.61, 23.69),
}
TABLE_7: Costs = {
    (BASELINE, WINDOW): (3.95, 11.76),
    (STAGE1, 400): (4.13, 8.25),
    (STAGE1, 200): (3.92, 5.46),
    (STAGE1, 100): (3.62, 4.06),
    (STAGE1, 50): (3.16, 3.35),
}


def write_report(recipe: Recipe) -> None:
    """Writes the blocks of the recipe's page, and the plots beside it."""
    results = Results(recipe)
    recipe.page.parent.mkdir(parents=True, exist_ok=True)
    blocks = {
        "conditions": conditions(results),
        "lengths": lengths(results),
        "table 1": table_1(results),
        "table 2": table_2(results),
        "table 3": costs(results, 3, "score and cost of shorter clips", TABLE_3, "LibriTTS of OpenASQA"),
        "table 4": table_4(results),
        "table 5": table_5(results),
        "table 7": costs(results, 7, "fusion after stage 1 only", TABLE_7, "speech_dialogue_QA_fisher"),
        "long": long_recordings(results),
    }
    text = recipe.page.read_text(encoding="utf-8") if recipe.page.exists() else HEAD
    recipe.page.write_text(insert_blocks(text, blocks, str(recipe.page), "evaluation/paper"), encoding="utf-8")


def join_parts(parts: Iterable[str]) -> str:
    """Returns parts of a page with a blank line between them, paragraphs in short lines."""
    return "\n\n".join(part if part[0] in "#|`!" else fill(part, 119) for part in parts)


def command(results: Results, methods: Iterable[Method], *steps: str) -> str:
    """Returns the command that makes all figures about these methods again; `steps` are added to it."""
    wanted = {results.recipe.model(method) for method in results.recipe.compared(methods)}
    models = [name for name in MODELS if name in wanted]
    words = ["python", "-m", "fastlongspeech.evaluation.paper", results.recipe.source]
    words += ["--quick"] if results.recipe.quick else []
    words += ["--steps", *(["train"] if wanted & set(RIVALS) else []), "evaluate", *steps, "report"]
    return f"```bash\n{join([*words, '--models', *models])}\n```"


def conditions(results: Results) -> str:
    """Returns how the page is made, what it compares, and what is not there yet."""
    recipe, found = results.recipe, results.summaries
    said = [
        "## How it was made",
        f"```bash\npython -m fastlongspeech.evaluation.paper {recipe.source}{' --quick' if recipe.quick else ''}\n```",
        "All figures on this page come from this command. It trains the rivals, asks every model under every "
        "condition and writes the tables. The command above a table makes that table alone. `--commands` prints a "
        "`fastlongspeech evaluate` command for every figure. In brackets: 95 % bootstrap intervals over recordings. "
        "Every model was trained once, so the intervals do not show what another seed would change. Recordings of up "
        f"to 30 s are not shortened at L = {WINDOW}, so all methods of a model are the same there.",
    ]
    if recipe.quick:
        said.append("**Cut down to see that everything works: these figures mean nothing.**")
    if results.missing:
        many = len(results.missing) + len(found)
        said.append(f"**{len(results.missing)} of {many} conditions are not there yet; a dash ({DASH}) marks them.**")
    how = {
        "fastlongspeech": "stage 2, dynamic lengths through iterative fusion",
        "stage1": "the base model and its CTC decoder, no stage 2",
    } | {
        name: "stage 2 with every frame, the same data and steps"
        if compression == "none"
        else f"stage 2, dynamic lengths through `{compression}`, the same data and steps"
        for name, compression in RIVALS.items()
    }
    folders = [(name, f"`{folder}`", how[name]) for name, folder in recipe.models.items()]
    said.append(table(["model", "folder", "trained by"], folders, 3))
    if missing := [name for name in MODELS if name not in recipe.models]:
        said.append(
            f"The recipe leaves out the models {', '.join(missing)}, and what compares trainings. What they would be "
            f"asked otherwise, `{OURS.model}` is asked; its training favours its own compression."
        )
    methods = recipe.compared(
        dict.fromkeys([*AT_LENGTHS, *TABLE_1, ONE_STEP, UNIFORM, *BEYOND_TABLE_1, BASELINE, CTC])
    )
    rows = [(method.name, recipe.model(method), f"`{method.compression}`") for method in methods]
    said.append(table(["method", "model", "`--compression`"], rows, 3))
    asked = []
    for name in recipe.benchmarks:
        of_it = [summary for condition, summary in found.items() if condition.benchmark == name]
        fields = ("questions", "recordings", "hours", "rows_left_out")
        sizes = [f"{round(of_it[0][field], 2):,}" for field in fields] if of_it else [DASH] * len(fields)
        asked.append([results.title(name), f"`{name}`", *sizes, METRICS[results.metric(name)][0]])
    headings = ["questions about", "benchmark", "questions", "recordings", "hours", "left out", "scored by"]
    said.append(table(headings, asked, 2))
    runs = [summary["run"] | summary["versions"] for summary in found.values()]
    machines = {
        f"{r['device']} ({r['dtype']}), torch {r['torch']}, transformers {r['transformers']}, Python {r['python']}"
        for r in runs
    }
    said += [f"Run on {'; '.join(sorted(machines))}."] if machines else []
    judges = sorted({run["judge_model"] for run in runs if "judge_model" in run})
    if judges:
        unparsable = sum(summary.get("unparsable_verdicts", 0) for summary in found.values())
        said.append(
            f"Judged by {', '.join(judges)}; {unparsable:,} of its verdicts could not be read, and count nowhere."
        )
    return join_parts(said)


def number(value: float | None, scale: float = 1) -> str:
    return DASH if value is None else f"{value / scale:.3g}"


def lengths(results: Results) -> str:
    """Returns scores, word errors and costs at every L (Fig. 2 of the paper), and their plot."""
    recipe = results.recipe
    path = recipe.page.with_name(f"{recipe.page.stem}-lengths.svg")
    said = [
        "## Fig. 2: score, word errors and cost against L",
        "The paper shows its Fig. 2 as curves only: FastLongSpeech above Random, AvgPool and MostSim at every L on "
        "three benchmarks, and far above at L = 12. As we understand the paper, Random, MostSim and AvgPool read with "
        'the plain fine-tune there; A-ToMe and "trained with it" are beyond the paper.',
    ]
    if plot_lengths(results, path):
        said.append(f"![Score, word errors and cost against L]({path.name})")
    for name in results.benchmarks(False):
        metric = results.metric(name)
        rows = []
        for method in recipe.compared(AT_LENGTHS):
            rows.append([method.name, *(cell(results.rows(name, method, n), metric) for n in recipe.lengths)])
        said += [
            f"### {results.title(name)}: {METRICS[metric][0]}",
            command(results, [*AT_LENGTHS, BASELINE]),
        ]
        said.append(table(["method", *(f"L = {length}" for length in recipe.lengths)], rows))
        every_frame = [(BASELINE.name, cell(results.rows(name, BASELINE), metric))]
        if metric == "word_errors":
            every_frame.append((CTC.name, cell(results.rows(name, CTC), metric)))
        if metric == "accuracy" and (rows_of_one := results.rows(name, BASELINE)):
            (_, most), *_ = Counter(row["answers"][0] for row in rows_of_one).most_common(1)
            every_frame.append(("always the commonest answer", f"{100 * most / len(rows_of_one):.1f}"))
        said.append(table(["without shortening", METRICS[metric][0]], every_frame))
    for name in results.benchmarks(False)[:1]:
        sign, size = results.unit(name)
        counted = {method.compression: method for method in reversed(AT_LENGTHS)}
        said.append(
            f"### {results.title(name)}: {sign} to the first token\n\n{command(results, [OURS])}\n\nCounted as by "
            f"`fastlongspeech cost`, with {TEXT_TOKENS} tokens of text and durations rounded to seconds; the same for "
            "all models."
        )
        rows = [
            [f"`{compression}`", *(number(results.flops(name, method, n), size) for n in recipe.lengths)]
            for compression, method in reversed(counted.items())
        ]
        said.append(table(["`--compression`", *(f"L = {length}" for length in recipe.lengths)], rows))
    return join_parts(said)


def table_1(results: Results) -> str:
    """Returns the scores of all methods on long recordings beside Table 1."""
    methods = results.recipe.compared([*TABLE_1, *BEYOND_TABLE_1])
    said = ["## Table 1: long recordings", ALL_LONG]
    for name in results.benchmarks(True):
        metric = results.metric(name)
        ours = results.rows(name, OURS)
        headings = ["method", PAPER, f"here: {METRICS[metric][0]}", "more than FastLongSpeech", METRICS["token_f1"][0]]
        rows = []
        for method in methods:
            found = results.rows(name, method)
            row = [method.name, f"{TABLE_1[method]:.2f}" if method in TABLE_1 else "", cell(found, metric)]
            rows.append(row + ["" if method == OURS else difference(found, ours, metric), cell(found, "token_f1")])
        said += [f"### {results.title(name)}", command(results, methods), table(headings, rows)]
        longest = results.longest(name, NTK_ROPE)
        if longest is not None:
            said.append(
                f"NTK-RoPE reads every frame of recordings of up to {longest:,}; longer ones are fused to that."
            )
    return join_parts(said)


def table_2(results: Results) -> str:
    """Returns the ablations on long recordings beside Table 2."""
    compared = {label: row for label, row in TABLE_2.items() if results.recipe.compared([row[0]])}
    how = "One round and plain means change what the trained FastLongSpeech hears when it answers"
    if "plain" in results.recipe.models:
        how += '; "w/o DCT" has its fusion and the plain fine-tune\'s language model'
    said = ["## Table 2: ablations", f"{how}. {ALL_LONG}"]
    for name in results.benchmarks(True):
        metric = results.metric(name)
        ours = results.rows(name, OURS)
        rows = []
        for label, (method, score) in compared.items():
            found = results.rows(name, method)
            less = ["", ""] if method == OURS else [f"{score - TABLE_1[OURS]:+.2f}", difference(found, ours, metric)]
            rows.append([label, f"{score:.2f}", less[0], cell(found, metric), less[1]])
        said += [f"### {results.title(name)}", command(results, [method for method, _ in compared.values()])]
        said.append(table(["method", PAPER, "difference", f"here: {METRICS[metric][0]}", "difference"], rows))
    return join_parts(said)


def costs(results: Results, number_of_table: int, heading: str, paper: Costs, source: str) -> str:
    """Returns scores and costs at several L beside Table 3 or 7, each cost also in terms of the baseline's."""
    said = [
        f"## Table {number_of_table}: {heading}",
        f"The paper's figures are those of {source}, at 7 B parameters and with logits at every position; ours are of "
        "this model, with logits at the last. `python -m fastlongspeech.speed.flops` counts the paper's.",
    ]
    for name in results.benchmarks(False):
        if number_of_table not in results.recipe.benchmarks[name].get("tables", []):
            continue
        metric = results.metric(name)
        sign, size = results.unit(name)
        whole = results.flops(name, BASELINE)
        rows = []
        for (method, length), (score, tflops) in paper.items():
            counted = results.flops(name, method, length)
            label = method.name if method == BASELINE else f"{method.name}, L = {length}"
            theirs = [f"{score:.2f}", f"{tflops:.2f}", f"{tflops / paper[BASELINE, WINDOW][1]:.2f}"]
            ratio = None if counted is None or whole is None else counted / whole
            rows.append(
                [
                    label,
                    *theirs,
                    cell(results.rows(name, method, length), metric),
                    number(counted, size),
                    number(ratio),
                ]
            )
        said += [f"### {results.title(name)}", command(results, [method for method, _ in paper])]
        headings = ["method", PAPER, "TFLOPs", "of baseline", f"here: {METRICS[metric][0]}", sign, "of baseline"]
        said.append(table(headings, rows))
    return join_parts(said)


def table_4(results: Results) -> str:
    """Returns score, counted operations and measured seconds on long recordings beside Table 4."""
    said = ["## Table 4: score, operations, seconds", ALL_LONG]
    for name in results.benchmarks(True):
        metric = results.metric(name)
        sign, size = results.unit(name)
        rows, figures = [], {}
        for method, (score, tflops, seconds) in TABLE_4.items():
            counted, measured = results.flops(name, method), results.seconds(name, method)
            figures[method] = counted, measured
            row = [method.name, f"{score:.2f}", f"{tflops:.2f}", f"{seconds:.2f}"]
            rows.append([*row, cell(results.rows(name, method), metric), number(counted, size), ratio(measured)])
        (ours, taken), (every, longer) = figures[OURS], figures[NTK_ROPE]
        theirs = [f"{a / b:.2f}" for a, b in zip(TABLE_4[OURS][1:], TABLE_4[NTK_ROPE][1:], strict=True)]
        share = f"{ours / every:.2f}" if ours is not None and every else DASH
        rows.append(["FastLongSpeech / NTK-RoPE", "", *theirs, "", share, ratio(taken, longer) if longer else DASH])
        said += [f"### {results.title(name)}", command(results, TABLE_4, "time")]
        headings = ["method", PAPER, "TFLOPs", "seconds", f"here: {METRICS[metric][0]}", sign, "seconds"]
        said.append(table(headings, rows))
        timed = results.seconds(name, OURS)
        if timed:
            first = timed[0]
            said.append(
                f"Seconds from the file to the whole answer, one recording at a time: means over {len(timed)} of the "
                f"recordings, spread evenly over the durations (mean {mean(r['duration'] for r in timed):.0f} s, "
                f"longest {max(r['duration'] for r in timed):.0f} s), on "
                f"{first['device']} with {first['threads']} threads, load {max(r['load'] for r in timed):.1f} at "
                "most; the paper's on an L40."
            )
    return join_parts(said)


def ratio(rows: Rows, others: Rows | None = None) -> str:
    """Returns the mean seconds of recordings, or in terms of those of others, with its interval, for a table."""
    seconds = {row["recording"]: row["seconds"] for row in rows}
    if not seconds:
        return DASH
    weights = {row["recording"]: row["seconds"] for row in others} if others else dict.fromkeys(seconds, 1.0)
    names = [name for name in seconds if name in weights]
    found = mean_with_interval([seconds[name] for name in names], names, [weights[name] for name in names])
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def table_5(results: Results) -> str:
    """Returns the word errors beside Table 5."""
    names = results.benchmarks(False, "word_errors")
    rows = []
    for (method, length), rates in TABLE_5.items():
        label = method.name if method == BASELINE else f"{method.name}, L = {length}"
        rows.append(
            [
                label,
                *(f"{rate:.2f}" for rate in rates),
                *(cell(results.rows(name, method, length), "word_errors") for name in names),
            ]
        )
    said = ["## Table 5: word errors", *([command(results, [method for method, _ in TABLE_5])] if names else [])]
    paper = ["paper: test-clean, %", "test-other, %", "GigaSpeech, %"]
    said.append(table(["method", *paper, *(f"here: {results.title(name)}, %" for name in names)], rows))
    return join_parts(said)


def long_recordings(results: Results) -> str:
    """Returns scores by duration and by the place of the fact in long recordings, and their plots."""
    methods = results.recipe.compared([*TABLE_1, *BEYOND_TABLE_1])
    said = [
        "## Duration, and where the fact is",
        f"{ALL_LONG} A fact's place is where its sentence begins; recordings of all durations are in every part.",
    ]
    for name in results.benchmarks(True):
        path = results.recipe.page.with_name(f"{results.recipe.page.stem}-{name}.svg")
        said += [f"### {results.title(name)}: {METRICS[results.metric(name)][0]}", command(results, methods)]
        if plot_long(results, name, path):
            said.append(f"![Scores against duration and place of the fact]({path.name})")
        for field, edges, heading in (
            ("duration", DURATIONS, "By duration, in seconds:"),
            ("place", FIFTHS, "By where the fact is said, in parts of the recording:"),
        ):
            rows: list[list[str]] = []
            headings = ["method", *(f"{low:g} to {high:g}" for low, high in zip(edges, edges[1:], strict=False))]
            for method in methods:
                bins = binned(results.rows(name, method), field, edges)
                if not any(bins):
                    continue
                if not rows:
                    rows.append(["questions", *(f"{len(part):,}" for part in bins)])
                    heard = [len({row["recording"] for row in part}) for part in bins]
                    rows.append(["recordings", *(f"{count:,}" for count in heard)])
                rows.append([method.name, *(cell(part, results.metric(name)) for part in bins)])
            if rows:
                said += [heading, table(headings, rows)]
    return join_parts(said)
