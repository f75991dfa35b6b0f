"""What summaries save and cost beside every frame and beside fusion: cache and operations of the language model.

    python -m fastlongspeech.speed.summaries --docs docs/speech-xl.md

For one question about recordings of a minute to two hours: counted from the sizes of two language models of 7B, and
measured on the demo model: the bytes of the cache's own tensors, and the operations that torch counts while the model
runs. The frames of the measured recordings are noise: neither depends on what is said. Nothing is timed.

Every frame is read an interval at a time too, as servers read long prompts. So no method pays for attention that is
masked, but within an interval. One pass with a kernel that does not skip what is masked costs nearly twice at 2 hours.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import sdpa_flop_count
from tqdm import tqdm
from transformers import DynamicCache

from fastlongspeech.app.cost import BEFORE, TEXT_TOKENS, ModelCost
from fastlongspeech.app.counting import count
from fastlongspeech.app.defaults import DEMO_MODEL
from fastlongspeech.app.loading import load_model
from fastlongspeech.app.markdown import insert_blocks, table
from fastlongspeech.app.sizes import QWEN2_AUDIO_7B
from fastlongspeech.evaluation.journal import Journal, read_journal

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
# torch counts attention by a GPU's kernels, and passes over the CPU's.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query, key, value
    )
}


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
        operations = [every_frame(counter, 25 * seconds), *(cost.flops["prefill"] for cost in costs[1:])]
        lines.append([_duration(seconds), *caches, *(f"{value / 1e12:.3g}" for value in operations)])
    return lines


def every_frame(counter: ModelCost, frames: int) -> int:
    """Returns the operations that read a question about so many frames, with none fused or summed up, by intervals."""
    operations, read = counter.logits(1), 0
    for tokens in pieces(frames):
        operations += counter.language_model(tokens, read)
        read += tokens
    return operations


def pieces(frames: int) -> list[int]:
    """Returns the tokens that are read at a time: the text before so many frames, their intervals, the text after."""
    whole, rest = divmod(frames, INTERVAL)
    return [BEFORE, *[INTERVAL] * whole, *[rest] * bool(rest), TEXT_TOKENS - BEFORE]


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

    def read() -> None:
        if ratio == 1:
            for piece in torch.cat((text[:BEFORE], embeddings, text[BEFORE:])).split(pieces(frames)):
                model.read_tokens(cache, piece)
            return
        model.read_tokens(cache, text[:BEFORE])
        list(model.read_recording(cache, embeddings, ratio))
        model.read_tokens(cache, text[BEFORE:])

    try:
        operations = count(read, ATTENTION)
    finally:
        hook.remove()
    return size(), most, operations


def measured(folder: str | Path, durations: Sequence[int], path: Path) -> list[list[str]]:
    """Returns lines of a table: durations, methods, and what `measure` found for each beside every frame.

    What the journal at `path` has of this model is not measured again; what is measured is added to it.
    """
    torch.manual_seed(0)
    model = load_model(str(folder), "cpu")[0].model
    if not model.config.summary_interval:
        model.add_summary(INTERVAL)
    methods = {name: values for name, values in METHODS.items() if values[0] != "iterative_fusion"}
    rows = [row for row in read_journal(path) if row["model"] == str(folder)]
    found = {(row["seconds"], row["method"]): row["found"] for row in rows}
    waiting = [(seconds, name) for seconds in durations for name in methods if (seconds, name) not in found]
    with Journal(path) as journal:
        for seconds, name in tqdm(waiting, desc="measuring"):
            _, length, ratio = methods[name]
            found[seconds, name] = measure(model, 25 * seconds, length, ratio)
            row = {"model": str(folder), "seconds": seconds, "method": name}
            journal.append(row | {"found": found[seconds, name]})
    lines = []
    for seconds in durations:
        for name in methods:
            of_it, whole = found[seconds, name], found[seconds, EVERY_FRAME]
            sizes = [f"{bytes_ / 2**20:.3g}" for bytes_ in of_it[:2]]
            shares = [f"{value / of_whole:.0%}" for value, of_whole in zip(of_it, whole, strict=True)]
            figures = [sizes[0], shares[0], sizes[1], shares[1], f"{of_it[2] / 1e9:.3g}", shares[2]]
            lines.append([_duration(seconds), name, *figures])
    return lines


def _duration(seconds: int) -> str:
    return f"{seconds // 3600} h" if seconds % 3600 == 0 else f"{seconds // 60} min"


def report(folder: str | Path, durations: Sequence[int], path: Path) -> str:
    """Returns all tables; `path` is that of `measured`."""
    parts = []
    for name, config in SIZES.items():
        headings = ["recording", *(f"{method}: GiB" for method in METHODS), *(f"{m}: TFLOPs" for m in METHODS)]
        parts += [f"{name}, counted in bfloat16, intervals of {INTERVAL}:", table(headings, counted(config))]
    headings = ["recording", "method", "cache, MiB", "share", "cache at most, MiB", "share", "GFLOPs", "share"]
    parts += [
        f"The demo model in float32, measured with torch {torch.__version__.partition('+')[0]} on a CPU; shares are "
        "of what every frame takes:",
        table(headings, measured(folder, durations, path), words=2),
    ]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder of the model to measure (default: the demo)")
    parser.add_argument("--seconds", type=int, nargs="+", default=SECONDS, metavar="S", help="measured recordings")
    parser.add_argument("--output", type=Path, default=Path("work/summaries.jsonl"), help="keeps what was measured")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="page to write the tables into")
    arguments = parser.parse_args(argv)
    text = report(arguments.model, arguments.seconds, arguments.output)
    print(text)
    if arguments.docs:
        page = arguments.docs.read_text(encoding="utf-8")
        page = insert_blocks(page, {"costs": text}, str(arguments.docs), "fastlongspeech.speed.summaries")
        arguments.docs.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
