"""Score against ratio and against operations: summaries, fusion, its rivals, and fusion before summaries.

    python -m fastlongspeech.evaluation.speech_xl work/summary work/corpus/test/qa.jsonl --output work/speech-xl

Each recording is asked the questions about facts that the manifest has. At a ratio r, every method keeps one token of
the language model's cache for every r frames. "Speech-XL" sums every frame up with the ratio r; "both" fuses to half
the frames and sums these up with r / 2. The rivals fuse, pool or merge to that number of frames; they are asked of
another model, `--rivals`, that was trained for it. Operations are those of the language model up to the first token of
an answer, counted for a recording of the mean number of frames.

To go on after an interruption, give the same command again. In the end the tables are printed, written into the page
`--docs` between their markers, and drawn beside it.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

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
RIVALS = {"iterative fusion": "iterative_fusion", "average pooling": "average_pooling", "A-ToMe": "adjacent_merging"}
METHODS = (SUMMARY, BOTH, *RIVALS)
HALF = 375  # frames of 30 s, half of them
ANSWER_TOKENS = 12
NOT_FACTS = ("voice", "transcription")


def conditions(ratios: Sequence[int]) -> list[tuple[str, int]]:
    """Returns the methods with their ratios; every frame has 1, of either model."""
    return [(EVERY_FRAME, 1), (f"{EVERY_FRAME}, {SUMMARY}", 1)] + [
        (name, ratio) for ratio in ratios for name in METHODS
    ]


class Asker:
    """Asks both models under every condition.

    Args:
        summary, rivals: folders of the model that sums up and of the one that fuses; their encoders are the same.
    """

    def __init__(self, summary: str, rivals: str) -> None:
        self.summary, self.processor = load_model(summary)
        self.rivals, _ = load_model(rivals)

    def encode(self, audio: Any) -> EncodedRecordings:
        """Returns a recording, encoded."""
        return self.rivals.encode(**self.processor(audio=[audio]).to(self.rivals.device))

    def ask(self, encoded: EncodedRecordings, questions: Sequence[str], method: str, ratio: int) -> list[str]:
        """Returns the answers to questions about a recording under a condition."""
        if method in (SUMMARY, BOTH):
            sizes = (None, ratio) if method == SUMMARY else (HALF, max(1, ratio // 2))
            kept = summarise_recording(self.summary, self.processor, encoded, *sizes)
            heard = [kept] * len(questions)
            answers = answer_summarised(self.summary, self.processor, questions, heard, ANSWER_TOKENS)
        else:
            model = self.summary if SUMMARY in method else self.rivals
            length = -(-int(encoded.lengths) // ratio)
            embeddings = model.compress(encoded, length, RIVALS.get(method, "none")).pooler_output
            answers = answer_batch(model, self.processor, questions, [embeddings] * len(questions), ANSWER_TOKENS)
        return [answer.text.strip() for answer in answers]


def collect(
    asker: Asker, questions: QuestionSet, name: str, ratios: Sequence[int], limit: int | None, path: Path
) -> None:
    """Asks what the journal at `path` does not hold yet of a data set, and adds it there."""
    done = {(row["data"], row["recording"], row["method"], row["ratio"]) for row in read_journal(path)}
    recordings: dict[str, list[Any]] = {}
    for example in questions.examples:
        if example.notes.get("kind") not in NOT_FACTS:
            recordings.setdefault(example.recording, []).append(example)
    with Journal(path) as journal:
        for recording in tqdm(list(recordings)[:limit], desc=name, unit="recording", disable=None):
            waiting = [each for each in conditions(ratios) if (name, recording, *each) not in done]
            if not waiting:
                continue
            examples = recordings[recording]
            encoded = asker.encode(questions.audio(examples[0]))
            for method, ratio in waiting:
                said = asker.ask(encoded, [example.question for example in examples], method, ratio)
                right = [exact_match(text, example.answers) for text, example in zip(said, examples, strict=True)]
                row = {"data": name, "recording": recording, "frames": int(encoded.lengths), "method": method}
                journal.append(row | {"ratio": ratio, "said": said, "right": right})


def operations(counter: ModelCost, frames: int, method: str, ratio: int) -> int:
    """Returns the language model's operations up to the first token of an answer about so many frames."""
    if method == SUMMARY:
        return counter.by_intervals(frames, ratio)
    if method == BOTH:
        return counter.by_intervals(-(-frames // 2), max(1, ratio // 2))
    return counter.language_model(-(-frames // ratio) + TEXT_TOKENS)


def kept_tokens(counter: ModelCost, frames: int, method: str, ratio: int) -> int:
    """Returns the tokens of a recording of so many frames that the cache keeps."""
    if method == SUMMARY:
        return count_summaries(frames, counter.sizes.summary_interval, ratio)
    if method == BOTH:
        return count_summaries(-(-frames // 2), counter.sizes.summary_interval, max(1, ratio // 2))
    return -(-frames // ratio)


def summarise_results(
    rows: Sequence[dict[str, Any]], counter: ModelCost, ratios: Sequence[int]
) -> list[dict[str, Any]]:
    """Returns the score, the tokens kept and the operations of every condition on every data set.

    A recording counts where every condition has been asked about it.
    """
    results = []
    for name in dict.fromkeys(row["data"] for row in rows):
        asked_about = Counter(row["recording"] for row in rows if row["data"] == name)
        whole = {recording for recording, count in asked_about.items() if count == len(conditions(ratios))}
        of_data = [row for row in rows if row["data"] == name and row["recording"] in whole]
        if not of_data:
            continue
        frames = round(mean({row["recording"]: row["frames"] for row in of_data}.values()))
        for method, ratio in conditions(ratios):
            asked = [row for row in of_data if (row["method"], row["ratio"]) == (method, ratio)]
            values = [float(right) for row in asked for right in row["right"]]
            groups = [row["recording"] for row in asked for _ in row["right"]]
            if values:
                sizes = {"data": name, "method": method, "ratio": ratio, "recordings": len(asked), "frames": frames}
                sizes |= {"questions": len(values), "tokens": kept_tokens(counter, frames, method, ratio)}
                score = mean_with_interval(values, groups)
                results.append(sizes | {"operations": operations(counter, frames, method, ratio), "score": score})
    return results


def report(results: Sequence[dict[str, Any]]) -> str:
    """Returns the tables of every data set."""
    parts = []
    for name in dict.fromkeys(row["data"] for row in results):
        found = {(row["method"], row["ratio"]): row for row in results if row["data"] == name}
        ratios = sorted({ratio for _, ratio in found if ratio > 1})
        any_row = next(iter(found.values()))
        whole = [
            f"{_percent(row)} by {'the model that sums up' if SUMMARY in method else 'the other model'}"
            for (method, ratio), row in found.items()
            if ratio == 1
        ]
        parts.append(
            f"**{name}**: {any_row['recordings']} recordings of {any_row['frames'] / 25:.0f} s on average, "
            f"{any_row['questions']} questions. With every frame: {' and '.join(whole)}. Right answers, with 95 % "
            "intervals over recordings, at equal tokens kept:"
        )
        lines = [[f"{r}", *(_percent(found.get((method, r))) for method in METHODS)] for r in ratios]
        parts.append(table(["ratio", *METHODS], lines))
        parts.append("Operations of the language model, as a share of those for every frame:")
        every = found[EVERY_FRAME, 1]["operations"]
        lines = [
            [f"{r}", *(f"{found[method, r]['operations'] / every:.0%}" for method in METHODS if (method, r) in found)]
            for r in ratios
        ]
        parts.append(table(["ratio", *METHODS], lines))
    return "\n\n".join(parts)


def _percent(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    score = row["score"]
    return f"{score['value']:.0%} ({score['low']:.0%} to {score['high']:.0%})"


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws scores against the tokens kept and against operations, a row of plots for every data set."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["data"] for row in results))
    figure, axes = pyplot.subplots(len(names), 2, figsize=(10, 3.6 * len(names)), squeeze=False, sharey="row")
    for (left, right), name in zip(axes, names, strict=True):
        of_data = [row for row in results if row["data"] == name]
        for method in METHODS:
            rows = [row for row in of_data if row["method"] == method]
            scores = [100 * row["score"]["value"] for row in rows]
            left.plot([row["ratio"] for row in rows], scores, marker="o", markersize=4, label=method)
            right.plot([row["operations"] / 1e9 for row in rows], scores, marker="o", markersize=4)
        for row in of_data:
            if row["ratio"] == 1:
                style = "--" if SUMMARY in row["method"] else ":"
                left.axhline(100 * row["score"]["value"], color="gray", linestyle=style, label=row["method"])
                right.plot([row["operations"] / 1e9], [100 * row["score"]["value"]], marker="x", color="gray")
        left.set(xscale="log", xlabel="frames for each token kept", ylabel=f"{name}: right answers, %")
        left.set_xticks([row["ratio"] for row in of_data], [str(row["ratio"]) for row in of_data])
        right.set(xscale="log", xlabel="operations of the language model, 10^9")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    pyplot.rcParams["svg.hashsalt"] = "fastlongspeech"  # the same file for the same results
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summary", help="folder of the model that sums up")
    parser.add_argument("data", nargs="+", type=Path, help="manifests of questions, each named by its folder")
    parser.add_argument("--rivals", help="folder of the model that fuses (default: the demo model of a checkout)")
    parser.add_argument("--ratios", type=int, nargs="+", default=[2, 4, 8, 16], metavar="R")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N recordings of each manifest only")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="answers and results")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="page to write the tables into")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "answers.jsonl"
    asker = Asker(arguments.summary, find_model(arguments.rivals))
    for source in arguments.data:
        questions = load_questions("qa", source)
        collect(asker, questions, source.parent.name, arguments.ratios, arguments.limit, path)
    results = summarise_results(read_journal(path), ModelCost(asker.summary.config), arguments.ratios)
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
