"""Averages the weights of two checkpoints of one model, before and after a further training.

    python -m fastlongspeech.demo.average work/dct work/dct-long work/average

Training on other data makes a model forget. The mean of both remembers most of that, and keeps most of what was
gained (Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv 2109.01903, who take the plain mean where
nothing is tuned). All but the weights is copied from the first checkpoint, such as the lengths L it was trained with.

The weights are written in float16, which takes half the space. Whoever loads them still computes in float32: `dtype`
in `config.json` says so, and `from_pretrained` follows it.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NOT_THE_MODEL = ("checkpoint-*", "runs", "training_args.bin", "trainer_state.json", "settings.yaml")


def average(before: Path, after: Path, output: Path) -> None:
    """Writes the model folder `output`, whose weights are the means of those of two others, in float16.

    Raises:
        FileExistsError: `output` is there already.
        ValueError: the checkpoints' weights differ in name or shape, or a mean is too large for float16.
    """
    if output.exists():
        raise FileExistsError(f"{output} is there already; delete it, or name another folder.")
    weights, others = (load_file(folder / "model.safetensors") for folder in (before, after))
    if {name: weight.shape for name, weight in weights.items()} != {n: weight.shape for n, weight in others.items()}:
        raise ValueError(f"{before} and {after} hold weights of other names or shapes; name two steps of one model.")
    means = {name: in_float16((weight.double() + others[name].double()) / 2) for name, weight in weights.items()}
    unfinished = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(before, unfinished, ignore=shutil.ignore_patterns(*NOT_THE_MODEL))
    save_file(means, unfinished / "model.safetensors", metadata={"format": "pt"})
    unfinished.replace(output)


def in_float16(weight: torch.Tensor) -> torch.Tensor:
    """Returns a weight rounded to float32 and then to float16; one too large for it is a ValueError."""
    rounded = weight.float().half()
    if not rounded.isfinite().all():
        raise ValueError(f"a weight is {weight.abs().max():g}, and float16 ends at 65504; write it as float32.")
    return rounded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="model folder")
    parser.add_argument("after", type=Path, help="model folder of a later step")
    parser.add_argument("output", type=Path, help="folder for the model of their mean weights")
    arguments = parser.parse_args()
    average(arguments.before, arguments.after, arguments.output)


if __name__ == "__main__":
    main()
