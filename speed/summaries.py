"""What summaries save and cost beside every frame and beside fusion: cache and operations of the language model.

    python -m fastlongspeech.speed.summaries --docs docs/speech-xl.md

Counted from the sizes of two language models of 7B, for one question about recordings of a minute to two hours; and
measured on the demo model, for recordings that a CPU reads in minutes: the bytes of the cache's own tensors, and the
operations that torch counts while the model runs. The frames of the measured recordings are noise: neither depends on
what is said. Nothing is timed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache

from fastlongspeech.app.cost import BEFORE, TEXT_TOKENS, ModelCost
from fastlongspeech.app.counting import count
from fastlongspeech.app.defaults import DEMO_MODEL
from fastlongspeech.app.loading import load_model
from fastlongspeech.app.markdown import insert_blocks, table
from fastlongspeech.app.sizes import QWEN2_AUDIO_7B

QWEN2_5_7B: dict[str, Any] = QWEN2_AUDIO_7B | {
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
    }
}
SIZES = {"Qwen2-Audio-7B (512 KiB a token)": QWEN2_AUDIO_7B, "Qwen2.5-7B (56 KiB a token)": QWEN2_5_7B}
SECONDS = (60, 300, 600, 1800, 3600, 7200)
MEASURED = (60, 120, 240, 600)
EVERY_FRAME = "every frame"
# Compression, target length, and ratio of summaries.
METHODS: dict[str, tuple[str, int, int]] = {
    EVERY_FRAME: ("none", 750, 1),
    "summaries, 8": ("summary", 750, 8),
    "summaries, 16": ("summary", 750, 16),
    "375 frames of 30 s, then summaries, 4": ("summary", 375, 4),
    "94 frames of 30 s, then summaries, 8": ("summary", 94, 8),
    "fused to 750": ("iterative_fusion", 750, 1),
}
INTERVAL = 720


def counted(config: dict[str, Any]) -> list[list[str]]:
    """Returns lines of a table: durations, the cache in GiB and the operations in TFLOPs of every method."""
    counter = ModelCost(config)
    lines = []
    for seconds in SECONDS:
        costs = [
            counter.recording(seconds, length, compression, compression_ratio=ratio)
            for compression, length, ratio in METHODS.values()
        ]
        caches = [f"{(cost.cache_bytes or 0) / 2**30:.3g}" for cost in costs]
        lines.append([_duration(seconds), *caches, *(f"{cost.flops['prefill'] / 1e12:.3g}" for cost in costs)])
    return lines


def measure(model: Any, frames: int, length: int, ratio: int) -> tuple[int, int, int]:
    """Returns the bytes of the cache in the end and at most, and the operations, of a recording of so many frames.

    Args:
        model: the inner model, with summary projections.
        frames: before fusion.
        length: frames of 30 s.
        ratio: of the summaries; 1: none are made, every frame stays.
    """
    frames = -(-frames * min(length, 750) // 750)
    text = torch.randn(TEXT_TOKENS, model.config.get_text_config().hidden_size)
    embeddings = torch.randn(frames, text.shape[1])
    cache: Any = DynamicCache(config=model.config.get_text_config())
    most = 0

    def size() -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    def watch(*_: Any) -> None:
        nonlocal most
        most = max(most, size())

    hook = model.language_model.register_forward_hook(watch)
    implementation = model.language_model.config._attn_implementation
    model.language_model.set_attn_implementation("eager")  # its products are counted on every device

    def read() -> None:
        model.read_tokens(cache, text[:BEFORE])
        if ratio > 1:
            list(model.read_recording(cache, embeddings, ratio))
        else:
            model.read_tokens(cache, embeddings)
        model.read_tokens(cache, text[BEFORE:])

    try:
        operations = count(read)
    finally:
        hook.remove()
        model.language_model.set_attn_implementation(implementation)
    return size(), most, operations


def measured(folder: str | Path, durations: Sequence[int]) -> list[list[str]]:
    """Returns lines of a table: durations, methods, and what `measure` found for each beside every frame."""
    torch.manual_seed(0)
    model = load_model(str(folder), "cpu")[0].model
    if not model.config.summary_interval:
        model.add_summary(INTERVAL)
    lines = []
    methods = {name: values for name, values in METHODS.items() if values[0] != "iterative_fusion"}
    for seconds in tqdm(durations, desc="measuring", leave=False, disable=None):
        whole: tuple[int, int, int] | None = None
        for name, (_, length, ratio) in methods.items():
            found = measure(model, 25 * seconds, length, ratio)
            whole = whole or found
            sizes = [f"{bytes_ / 2**20:.3g}" for bytes_ in found[:2]]
            shares = [f"{value / of_whole:.0%}" for value, of_whole in zip(found, whole, strict=True)]
            lines.append(
                [
                    _duration(seconds),
                    name,
                    sizes[0],
                    shares[0],
                    sizes[1],
                    shares[1],
                    f"{found[2] / 1e9:.3g}",
                    shares[2],
                ]
            )
    return lines


def _duration(seconds: int) -> str:
    return f"{seconds // 3600} h" if seconds % 3600 == 0 else f"{seconds // 60} min"


def report(folder: str | Path, durations: Sequence[int]) -> str:
    """Returns all tables."""
    parts = []
    for name, config in SIZES.items():
        headings = ["recording", *(f"{method}: GiB" for method in METHODS), *(f"{m}: TFLOPs" for m in METHODS)]
        parts += [f"{name}, counted in bfloat16, intervals of {INTERVAL}:", table(headings, counted(config))]
    headings = ["recording", "method", "cache, MiB", "share", "cache at most, MiB", "share", "GFLOPs", "share"]
    parts += [
        f"The demo model in float32, measured with torch {torch.__version__.partition('+')[0]} on a CPU; shares are "
        "of what every frame takes:",
        table(headings, measured(folder, durations), words=2),
    ]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder of the model to measure (default: the demo)")
    parser.add_argument("--seconds", type=int, nargs="+", default=MEASURED, metavar="S", help="measured recordings")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="page to write the tables into")
    arguments = parser.parse_args(argv)
    text = report(arguments.model, arguments.seconds)
    print(text)
    if arguments.docs:
        page = arguments.docs.read_text(encoding="utf-8")
        page = insert_blocks(page, {"costs": text}, str(arguments.docs), "fastlongspeech.speed.summaries")
        arguments.docs.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
