"""Score against ratio and against operations: summaries, fusion, its rivals, and fusion before summaries.

    python -m fastlongspeech.evaluation.speech_xl work/summary --data work/corpus/test/qa.jsonl --output work/speech-xl

Each recording is asked the questions about facts that the manifest has.

At equal tokens, every method keeps one token of the language model's cache for every r frames. "Speech-XL" sums every
frame up with the ratio r; "both" fuses to half the frames and sums these up with r / 2. The rivals fuse, pool or merge
to that number of frames; they are asked of another model, `--rivals`, that was trained for it.

At equal operations, the rivals keep as many frames as cost what "Speech-XL", or "both", costs at r: all of them where
even that is less. Operations are those of the language model up to the first token of an answer. The tables count them
for a recording of the mean number of frames.

To go on after an interruption, give the same command again. In the end the tables are printed, written into the page
`--docs` between their markers, and drawn beside it.
"""

import argparse
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from tqdm import tqdm

from ..app.cost import TEXT_TOKENS, ModelCost
from ..app.defaults import find_model
from ..app.loading import load_model
from ..app.markdown import insert_blocks, table
from ..data.tasks import QuestionSet, load_questions
from ..recordings_fastlongspeech import EncodedRecordings
from ..windows_fastlongspeech import count_summaries
from .answering import answer_batch, answer_summarised, summarise_recording
from .journal import Journal, read_journal
from .run import versions
from .scoring import exact_match, mean_with_interval

SUMMARY, BOTH, EVERY_FRAME = "Speech-XL", "both", "every frame"
SUMMING = (SUMMARY, BOTH)
RIVALS = {"iterative fusion": "iterative_fusion", "average pooling": "average_pooling", "A-ToMe": "adjacent_merging"}
HALF = 375  # frames of 30 s, half of them
ANSWER_TOKENS = 12
NOT_FACTS = ("voice", "transcription")


class Condition(NamedTuple):
    """How a recording reaches the language model.

    Attributes:
        method: one of `SUMMING` or `RIVALS`, or every frame.
        ratio: frames for each token that is kept; 1 with every frame.
        model: the folder's name of the model that sums up; "" for the rivals' model.
        like: of a rival, the method whose operations at this ratio it spends; "": it keeps as many tokens as the rest.
    """

    method: str
    ratio: int
    model: str = ""
    like: str = ""


def conditions(models: Sequence[str], ratios: Sequence[int]) -> list[Condition]:
    """Returns all conditions for the models of these names."""
    whole = [Condition(EVERY_FRAME, 1, model) for model in ("", *models)]
    summing = [Condition(name, ratio, model) for ratio in ratios for name in SUMMING for model in models]
    rivals = [Condition(name, ratio, "", like) for like in ("", *SUMMING) for ratio in ratios for name in RIVALS]
    return whole + summing + rivals


class Asker:
    """Asks the models under every condition.

    Args:
        folders: of the models that sum up, by name.
        rivals: folder of the model that fuses; all encoders are the same.
    """

    def __init__(self, folders: dict[str, str], rivals: str) -> None:
        self.models, self.processor = {}, None
        for name, folder in folders.items():
            self.models[name], self.processor = load_model(folder)
        self.models[""], _ = load_model(rivals)
        self.counter = ModelCost(self.models[next(iter(folders))].config)

    def encode(self, audio: Any) -> EncodedRecordings:
        """Returns a recording, encoded."""
        model: Any = self.models[""]
        processor: Any = self.processor
        return model.encode(**processor(audio=[audio]).to(model.device))

    def ask(self, encoded: EncodedRecordings, questions: Sequence[str], condition: Condition) -> list[str]:
        """Returns the answers to questions about a recording under a condition."""
        method, ratio, model = condition.method, condition.ratio, self.models[condition.model]
        if method in SUMMING:
            sizes = (None, ratio) if method == SUMMARY else (HALF, max(1, ratio // 2))
            kept = summarise_recording(model, self.processor, encoded, *sizes)
            answers = answer_summarised(model, self.processor, questions, [kept] * len(questions), ANSWER_TOKENS)
        else:
            length = kept_tokens(self.counter, int(encoded.lengths), condition)
            embeddings = model.compress(encoded, length, RIVALS.get(method, "none")).pooler_output
            answers = answer_batch(model, self.processor, questions, [embeddings] * len(questions), ANSWER_TOKENS)
        return [answer.text.strip() for answer in answers]


def collect(
    asker: Asker,
    questions: QuestionSet,
    name: str,
    wanted: Sequence[Condition],
    limit: int | None,
    path: Path,
) -> None:
    """Asks what the journal at `path` does not hold yet of a data set, and adds it there."""
    done = {(row["data"], row["recording"], _condition(row)) for row in read_journal(path)}
    recordings: dict[str, list[Any]] = {}
    for example in questions.examples:
        if example.notes.get("kind") not in NOT_FACTS:
            recordings.setdefault(example.recording, []).append(example)
    with Journal(path) as journal:
        for recording in tqdm(list(recordings)[:limit], desc=name, unit="recording", disable=None):
            waiting = [each for each in wanted if (name, recording, each) not in done]
            if not waiting:
                continue
            examples = recordings[recording]
            encoded = asker.encode(questions.audio(examples[0]))
            for condition in waiting:
                said = asker.ask(encoded, [example.question for example in examples], condition)
                right = [exact_match(text, example.answers) for text, example in zip(said, examples, strict=True)]
                row = {"data": name, "recording": recording, "frames": int(encoded.lengths)} | condition._asdict()
                journal.append(row | {"said": said, "right": right})


def _condition(row: dict[str, Any]) -> Condition:
    return Condition(*(row[name] for name in Condition._fields))


def operations(counter: ModelCost, frames: int, condition: Condition) -> int:
    """Returns the language model's operations up to the first token of an answer about so many frames."""
    if condition.method == SUMMARY:
        return counter.by_intervals(frames, condition.ratio)
    if condition.method == BOTH:
        return counter.by_intervals(-(-frames // 2), max(1, condition.ratio // 2))
    return counter.language_model(kept_tokens(counter, frames, condition) + TEXT_TOKENS)


def kept_tokens(counter: ModelCost, frames: int, condition: Condition) -> int:
    """Returns the tokens of a recording of so many frames that the cache keeps."""
    method, ratio, _, like = condition
    if method == SUMMARY:
        return count_summaries(frames, counter.sizes.summary_interval, ratio)
    if method == BOTH:
        return count_summaries(-(-frames // 2), counter.sizes.summary_interval, max(1, ratio // 2))
    if not like:
        return -(-frames // ratio)
    most = operations(counter, frames, Condition(like, ratio))
    fitting = bisect_right(range(frames + 1), most, key=lambda kept: counter.language_model(kept + TEXT_TOKENS))
    return max(1, fitting - 1)


def summarise_results(
    rows: Sequence[dict[str, Any]], counter: ModelCost, wanted: Sequence[Condition]
) -> list[dict[str, Any]]:
    """Returns the score, the tokens kept and the operations of every condition on every data set.

    A recording counts where every condition has been asked about it.
    """
    results = []
    for name in dict.fromkeys(row["data"] for row in rows):
        of_data = [row for row in rows if row["data"] == name and _condition(row) in wanted]
        asked_about = Counter(row["recording"] for row in of_data)
        of_data = [row for row in of_data if asked_about[row["recording"]] == len(wanted)]
        if not of_data:
            continue
        frames = round(mean({row["recording"]: row["frames"] for row in of_data}.values()))
        for condition in wanted:
            asked = [row for row in of_data if _condition(row) == condition]
            values = [float(right) for row in asked for right in row["right"]]
            groups = [row["recording"] for row in asked for _ in row["right"]]
            sizes = {"data": name} | condition._asdict() | {"recordings": len(asked), "frames": frames}
            sizes |= {"questions": len(values), "tokens": kept_tokens(counter, frames, condition)}
            score = mean_with_interval(values, groups)
            results.append(sizes | {"operations": operations(counter, frames, condition), "score": score})
    return results


def report(results: Sequence[dict[str, Any]]) -> str:
    """Returns the tables of every data set."""
    parts = []
    for name in dict.fromkeys(row["data"] for row in results):
        found = {_condition(row): row for row in results if row["data"] == name}
        ratios = sorted({condition.ratio for condition in found} - {1})
        models = [condition.model for condition in found if condition.ratio == 1 and condition.model]
        summing = [(method, model) for method in SUMMING for model in models]
        columns = [*summing, *((rival, "") for rival in RIVALS)]
        headings = [_heading(*column, models) for column in columns]
        every = found[Condition(EVERY_FRAME, 1)]
        whole = [f"{_percent(every)} by the rivals' model"]
        whole += [f"{_percent(found[Condition(EVERY_FRAME, 1, model)])} by {model}" for model in models]
        parts.append(
            f"**{name}**: {every['recordings']} recordings of {every['frames'] / 25:.0f} s on average, "
            f"{every['questions']} questions. With every frame: {', '.join(whole)}. Right answers, with 95 % "
            "intervals over recordings, at equal tokens kept:"
        )
        at = {(ratio, column): found[Condition(column[0], ratio, column[1])] for ratio in ratios for column in columns}
        lines = [[f"{ratio}", *(_percent(at[ratio, column]) for column in columns)] for ratio in ratios]
        parts.append(table(["ratio", *headings], lines))
        parts.append("Operations of the language model for these, as a share of those for every frame:")
        of_method = {column[0]: column for column in columns}
        lines = [
            [f"{ratio}", *(_share(at[ratio, column], every) for column in of_method.values())] for ratio in ratios
        ]
        parts.append(table(["ratio", *of_method], lines))
        parts.append("At equal operations, with the share of the frames that the rivals keep for them:")
        lines = []
        for like in SUMMING:
            for ratio in ratios:
                rivals = [found[Condition(rival, ratio, "", like)] for rival in RIVALS]
                scores = [_percent(at[ratio, (like, model)]) for model in models] + [_percent(row) for row in rivals]
                share = f"{rivals[0]['tokens'] / every['frames']:.0%}"
                lines.append([f"{like}, {ratio}", _share(at[ratio, (like, models[0])], every), share, *scores])
        names = models if len(models) > 1 else ["the method itself"]
        parts.append(table(["method and ratio", "operations", "frames", *names, *RIVALS], lines))
    return "\n\n".join(parts)


def _heading(method: str, model: str, models: Sequence[str]) -> str:
    return f"{method} ({model})" if model and len(models) > 1 else method


def _share(row: dict[str, Any], every: dict[str, Any]) -> str:
    return f"{row['operations'] / every['operations']:.0%}"


def _percent(row: dict[str, Any]) -> str:
    score = row["score"]
    return f"{score['value']:.0%} ({score['low']:.0%} to {score['high']:.0%})"


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws scores against the tokens kept and against operations, a row of plots for every data set."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    names = list(dict.fromkeys(row["data"] for row in results))
    figure, axes = pyplot.subplots(len(names), 2, figsize=(10, 3.6 * len(names)), squeeze=False, sharey="row")
    for (left, right), name in zip(axes, names, strict=True):
        of_data = [row for row in results if row["data"] == name]
        models = [row["model"] for row in of_data if row["ratio"] == 1 and row["model"]]
        for method, model in dict.fromkeys((row["method"], row["model"]) for row in of_data if row["ratio"] > 1):
            rows = [row for row in of_data if row["ratio"] > 1 and (row["method"], row["model"]) == (method, model)]
            rows = sorted(rows, key=lambda row: row["operations"])
            for axis, quantity in ((left, "ratio"), (right, "operations")):
                points = [row for row in rows if axis is right or not row["like"]]
                values = [row[quantity] / (1 if axis is left else 1e9) for row in points]
                scores = [100 * row["score"]["value"] for row in points]
                label = _heading(method, model, models) if axis is left else None
                axis.plot(values, scores, marker="o", markersize=4, label=label)
        for row in of_data:
            if row["ratio"] == 1:
                style, score = "--" if row["model"] else ":", 100 * row["score"]["value"]
                label = f"{EVERY_FRAME}, {row['model'] or 'rivals'}"
                left.axhline(score, color="gray", linestyle=style, label=label)
                right.plot([row["operations"] / 1e9], [score], marker="x", color="gray")
        left.set(xscale="log", xlabel="frames for each token kept", ylabel=f"{name}: right answers, %")
        left.set_xticks([row["ratio"] for row in of_data], [str(row["ratio"]) for row in of_data])
        right.set(xscale="log", xlabel="operations of the language model, 10^9")
        right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.xaxis.set_major_formatter(ScalarFormatter())
        right.xaxis.set_minor_formatter(NullFormatter())  # labels between these would overlap
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.26 / len(names), 1, 1))
    figure.legend(lines, labels, loc="lower center", ncols=4, fontsize=8)
    pyplot.rcParams["svg.hashsalt"] = "fastlongspeech"  # the same file for the same results
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of models that sum up, each named by its folder")
    parser.add_argument(
        "--data", nargs="+", type=Path, required=True, help="manifests of questions, each named by its folder"
    )
    parser.add_argument("--rivals", help="folder of the model that fuses (default: the demo model of a checkout)")
    parser.add_argument("--ratios", type=int, nargs="+", default=[2, 4, 8, 16], metavar="R")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N recordings of each manifest only")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="answers and results")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="page to write the tables into")
    arguments = parser.parse_args(argv)
    folders = {Path(folder).absolute().name: folder for folder in arguments.models}
    if len(folders) < len(arguments.models):
        parser.error(f"models must have folders of different names, got {', '.join(arguments.models)}; rename one.")
    if min(arguments.ratios) < 2:
        parser.error(f"--ratios must be 2 or more, got {min(arguments.ratios)}; every frame is asked anyway.")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "answers.jsonl"
    wanted = conditions(list(folders), arguments.ratios)
    asker = Asker(folders, find_model(arguments.rivals))
    for source in arguments.data:
        questions = load_questions("qa", source)
        collect(asker, questions, source.parent.name, wanted, arguments.limit, path)
    results = summarise_results(read_journal(path), asker.counter, wanted)
    text = json.dumps({"results": results, "versions": versions()}, indent=1)
    (arguments.output / "results.json").write_text(text + "\n", encoding="utf-8")
    print(report(results))
    if arguments.docs:
        page = arguments.docs.read_text(encoding="utf-8")
        draw(results, arguments.docs.with_suffix(".svg"))
        block = f"{report(results)}\n\n![Right answers against ratio and operations]({arguments.docs.stem}.svg)"
        writer = "fastlongspeech.evaluation.speech_xl"
        arguments.docs.write_text(
            insert_blocks(page, {"scores": block}, str(arguments.docs), writer), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
