"""Averages the weights of two checkpoints of one model, before and after a further training.

    python -m fastlongspeech.demo.average work/dct work/dct-long work/average

What a training on other data makes a model forget, the mean of both mostly remembers, and it keeps most of what was
gained (Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv 2109.01903, who take the plain mean where
nothing is tuned). Everything but the weights is the first checkpoint's, such as the lengths L it was trained with.
"""

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

NOT_THE_MODEL = ("checkpoint-*", "runs", "training_args.bin", "trainer_state.json", "settings.yaml")


def average(before: Path, after: Path, output: Path) -> None:
    """Writes the model folder `output`, whose weights are the means of those of two others.

    Raises:
        FileExistsError: `output` is there already.
        ValueError: the checkpoints' weights differ in name or shape.
    """
    if output.exists():
        raise FileExistsError(f"{output} is there already; delete it, or name another folder.")
    weights, others = (load_file(folder / "model.safetensors") for folder in (before, after))
    if {name: weight.shape for name, weight in weights.items()} != {n: weight.shape for n, weight in others.items()}:
        raise ValueError(f"{before} and {after} hold weights of other names or shapes; name two steps of one model.")
    means = {name: ((weight.double() + others[name].double()) / 2).to(weight) for name, weight in weights.items()}
    unfinished = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(before, unfinished, ignore=shutil.ignore_patterns(*NOT_THE_MODEL))
    save_file(means, unfinished / "model.safetensors", metadata={"format": "pt"})
    unfinished.replace(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="model folder")
    parser.add_argument("after", type=Path, help="model folder of a later step")
    parser.add_argument("output", type=Path, help="folder for the model of their mean weights")
    arguments = parser.parse_args()
    average(arguments.before, arguments.after, arguments.output)


if __name__ == "__main__":
    main()
