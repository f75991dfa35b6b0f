"""What the paper's tables compare: methods, the conditions they are asked under, and the recipe that names both."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ...compression_fastlongspeech import COMPRESSIONS

RIVALS = {"plain": "none", "average_pooling": "average_pooling", "most_similar": "most_similar"}  # trained through
MODELS = ("fastlongspeech", "stage1", *RIVALS)
WINDOW = 750  # frames of 30 s: at this length a short recording keeps every frame
QUICK_ROWS = 4
OWN_FIELDS = ("title", "long", "tables", "cascade_prompt")  # of a benchmark; the others are arguments of evaluate


class Method(NamedTuple):
    """A row of the tables: which ``model`` hears recordings through which ``compression`` of `evaluate`."""

    name: str
    model: str
    compression: str


OURS = Method("FastLongSpeech", "fastlongspeech", "iterative_fusion")
RANDOM = Method("Random", "plain", "random")
SIMILAR = Method("MostSim", "plain", "most_similar")
POOLING = Method("AvgPool", "plain", "average_pooling")
MERGING = Method("A-ToMe", "plain", "adjacent_merging")
PLAIN_FUSION = Method("iterative fusion, plain fine-tune", "plain", "iterative_fusion")
POOLING_TRAINED = Method("AvgPool, trained with it", "average_pooling", "average_pooling")
SIMILAR_TRAINED = Method("MostSim, trained with it", "most_similar", "most_similar")
STAGE1 = Method("iterative fusion, stage 1 only", "stage1", "iterative_fusion")
NTK_ROPE = Method("NTK-RoPE", "plain", "ntk_rope")
ONE_STEP = Method("FastLongSpeech, one round", "fastlongspeech", "single_step_fusion")
UNIFORM = Method("FastLongSpeech, plain means", "fastlongspeech", "uniform_density")
BASELINE = Method("base model, every frame", "stage1", "none")
CTC = Method("CTC decoder", "fastlongspeech", "ctc")
AT_LENGTHS = (OURS, RANDOM, SIMILAR, POOLING, MERGING, PLAIN_FUSION, POOLING_TRAINED, SIMILAR_TRAINED, STAGE1)
CASCADES = (
    Method("cascade, stage 1 only", "stage1", "cascade"),
    Method("CTC cascade, stage 1 only", "stage1", "ctc_cascade"),
    Method("cascade", "fastlongspeech", "cascade"),
    Method("CTC cascade", "fastlongspeech", "ctc_cascade"),
)
# What these compare is how a model was trained: they are left out where a recipe has no such model.
OF_TRAINING = (PLAIN_FUSION, POOLING_TRAINED, SIMILAR_TRAINED, STAGE1, *CASCADES[:2])
ON_LONG = (
    *(OURS, ONE_STEP, UNIFORM),
    *(RANDOM, SIMILAR, POOLING, PLAIN_FUSION, MERGING, NTK_ROPE),
    *(POOLING_TRAINED, SIMILAR_TRAINED, STAGE1),
    *CASCADES,
)


class Condition(NamedTuple):
    """One run of `fastlongspeech evaluate`: the benchmark's name, the model's, what shortens recordings, and L."""

    benchmark: str
    model: str
    compression: str
    length: int | None


@dataclass(frozen=True)
class Recipe:
    """What is compared, as in `evaluation/recipes/`.

    Attributes:
        output: folder for the predictions of all conditions.
        page: Markdown file to write; its plots go beside it.
        models: folders of `MODELS`; rivals that are missing there are trained. All but `fastlongspeech` may be left
            out of the recipe: what they would be asked, `fastlongspeech` is asked.
        training: arguments of `fastlongspeech.train.dct` that the rivals share.
        lengths: L of the short benchmarks.
        benchmarks: by name, the arguments of `fastlongspeech evaluate` that say what is asked; a `title`; `long`
            where recordings are longer than a window of 30 s: these are fused to `WINDOW` frames; and `tables`, those
            of the paper's tables 3 and 7 that the benchmark stands in.
        source: the recipe's file.
        quick: whether it is cut down to see that everything works.
    """

    output: Path
    page: Path
    models: dict[str, str]
    training: list[str]
    lengths: list[int]
    benchmarks: dict[str, dict[str, Any]]
    source: str
    quick: bool

    @classmethod
    def read(cls, source: str, quick: bool = False) -> "Recipe":
        """Returns the recipe in a YAML file, cut down if `quick`.

        Raises:
            ValueError: it lacks something, or holds something else.
        """
        content = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
        known = {field.name for field in dataclasses.fields(cls)} - {"source", "quick"}
        if not isinstance(content, dict) or set(content) != known:
            raise ValueError(f"{source} must set {', '.join(sorted(known))} and nothing else; correct it.")
        if not {OURS.model} <= set(content["models"]) <= set(MODELS):
            named = ", ".join(content["models"])
            raise ValueError(
                f"{source} must name the model {OURS.model}, and none but {', '.join(MODELS)}, got {named}."
            )
        output, page = Path(content["output"]), Path(content["page"])
        content["training"] = list(map(str, content["training"]))
        if quick:
            output, page = output / "quick", output / "quick" / "results.md"
            content["models"] |= {name: str(output / "models" / name) for name in RIVALS if name in content["models"]}
            content["training"] += ["--max_steps", "2"]
            content["lengths"] = [max(content["lengths"]), min(content["lengths"])]
            for asked in content["benchmarks"].values():
                asked["limit"] = QUICK_ROWS
        return cls(**(content | {"output": output, "page": page, "source": source, "quick": quick}))

    def is_long(self, benchmark: str) -> bool:
        """Tells whether recordings of a benchmark are longer than a window."""
        return bool(self.benchmarks[benchmark].get("long"))

    def compared(self, methods: Iterable[Method]) -> list[Method]:
        """Returns those of the methods that the recipe compares."""
        return [method for method in methods if method.model in self.models or method not in OF_TRAINING]

    def model(self, method: Method) -> str:
        """Returns the name of the model that a method is asked of."""
        return method.model if method.model in self.models else OURS.model

    def condition(self, benchmark: str, method: Method, length: int = WINDOW) -> Condition:
        """Returns the condition of a method at a length; short recordings keep every frame from `WINDOW` on."""
        compression = method.compression
        if compression in COMPRESSIONS and length >= WINDOW and not self.is_long(benchmark):
            compression = "none"
        return Condition(benchmark, self.model(method), compression, length if compression in COMPRESSIONS else None)

    def conditions(self) -> list[Condition]:
        """Returns all conditions, the most important first."""
        wanted = []
        for benchmark, asked in self.benchmarks.items():
            if self.is_long(benchmark):
                wanted += [self.condition(benchmark, method) for method in self.compared(ON_LONG)]
                continue
            methods = self.compared(AT_LENGTHS)
            wanted += [self.condition(benchmark, method, length) for method in methods for length in self.lengths]
            wanted.append(self.condition(benchmark, BASELINE))
            if asked["task"] == "asr":
                wanted.append(self.condition(benchmark, CTC))

        def importance(condition: Condition) -> tuple[bool, ...]:
            others = condition.model not in (OURS.model, RANDOM.model)
            return "cascade" in condition.compression, others, not self.is_long(condition.benchmark)

        return sorted(dict.fromkeys(wanted), key=importance)

    def folder(self, condition: Condition) -> Path:
        """Returns where the predictions of a condition are."""
        _, *parts = condition
        return self.output / condition.benchmark / "-".join(str(part) for part in parts if part is not None)

    def command(self, condition: Condition) -> list[str]:
        """Returns the arguments of `fastlongspeech evaluate`."""
        benchmark = self.benchmarks[condition.benchmark]
        options = {name: value for name, value in benchmark.items() if name not in OWN_FIELDS}
        options |= {"model": self.models[condition.model], "compression": condition.compression}
        options["target_length"] = condition.length
        if "cascade" in condition.compression:
            options["cascade_prompt"] = benchmark.get("cascade_prompt")
        options["output"] = self.folder(condition)
        words = []
        for name, value in options.items():
            if value is not None:
                words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return words
