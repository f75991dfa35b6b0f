"""The paper's costs, and the operations counted at the sizes of Qwen2-Audio-7B. Needs no weights, takes minutes.

    python -m fastlongspeech.speed.flops

The paper does not say what its figures count. They fit, for short clips, if we count:

- one prefill and no answer;
- every window encoded at its full 30 s;
- logits of the vocabulary at every position;
- a CTC decoder of two matrices, which weighs all frames in every round of the ladder 400, 200, 100, 50.

Nor does it give the frames and text tokens of the mean clip; we chose those that fit best. LongSpeech-Eval is counted
for one recording of its mean duration, halved by Eq. 5, with 40 text tokens. Real durations spread around the mean.
That would add to the cost of every frame and hardly change ours. Our densities are counted as a GPU takes them: of all
frames in every round. A CPU leaves out frames that have not changed.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

from fastlongspeech import FastLongSpeechConfig
from fastlongspeech.app.cost import TEXT_TOKENS, ModelCost, mel_frames_of
from fastlongspeech.app.markdown import table
from fastlongspeech.app.sizes import QWEN2_AUDIO_7B

from .common import FRAMES_PER_SECOND, RESULTS, TINY, number, parse

# Seconds, text tokens, the schedule of lengths, and TFLOPs by L (None: every frame).
PAPER: dict[str, tuple[float, int, str, dict[int | None, float]]] = {
    "LibriTTS": (490 / FRAMES_PER_SECOND, 28, "ladder", {None: 9.79, 400: 8.54, 200: 5.64, 100: 4.17}),
    "Fisher": (636 / FRAMES_PER_SECOND, 15, "ladder", {None: 11.76, 400: 8.25, 200: 5.46, 100: 4.06, 50: 3.35}),
    "LongSpeech-Eval": (132.77, TEXT_TOKENS, "halving", {None: 61.21, 750: 26.44}),
}
SECONDS = (10, 30, 60, 133, 300, 600, 1800, 3600, 7200, 36_000)
LENGTHS = (750, 400, 100)
EVERY_FRAME = "every frame"
PARTS = ("encoder", "ctc decoder", "fusion", "projector", "prefill")
ANSWER_TOKENS = 100


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse(__doc__ or "", argv)
    sizes = TINY if arguments.quick else QWEN2_AUDIO_7B
    counter = {
        schedule: ModelCost(FastLongSpeechConfig(**sizes, fusion_schedule=schedule))
        for schedule in ("halving", "ladder")
    }
    datasets = list(PAPER)[-1:] if arguments.quick else list(PAPER)
    papers = [
        compare(counter[schedule], name, seconds, text_tokens, length, paper)
        for name in datasets
        for seconds, text_tokens, schedule, figures in [PAPER[name]]
        for length, paper in tqdm(figures.items(), desc=name, leave=False, disable=None)
    ]
    durations = []
    halving = counter["halving"]
    for seconds in tqdm(SECONDS[:2] if arguments.quick else SECONDS, desc="durations", leave=False, disable=None):
        fused = {length: halving.recording(seconds, length) for length in LENGTHS}
        every = halving.recording(seconds, compression="none")
        flops = {f"L = {length}": cost.total for length, cost in fused.items()} | {EVERY_FRAME: every.total}
        parts = {part: fused[400].flops[part] for part in PARTS}
        prompts = {"L = 400": fused[400].tokens + TEXT_TOKENS, EVERY_FRAME: every.tokens + TEXT_TOKENS}
        answers = {name: halving.answer(prompt, ANSWER_TOKENS) for name, prompt in prompts.items()}
        durations.append({"seconds": seconds, "totals": flops, "parts": parts, "answers": answers})
    results = {
        "benchmark": "flops",
        "command": "python -m fastlongspeech.speed.flops",
        "machine": {"torch": torch.__version__, "transformers": transformers.__version__},
        "papers": papers,
        "durations": durations,
    }
    output = arguments.output or (None if arguments.quick else RESULTS / "flops.json")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
    print(report(results))
    return results


def compare(
    counter: ModelCost, name: str, seconds: float, text_tokens: int, length: int | None, paper: float
) -> dict[str, Any]:
    """Returns one of the paper's figures in TFLOPs, its reading counted, and what this package saves of that."""
    mel_frames = mel_frames_of(seconds)
    compression = "none" if length is None else "iterative_fusion"
    ours = counter.recording(seconds, length, compression, text_tokens)
    ctc_decoder, fusion = counter.fusion(ours.frames, length, compression, two_matrices=True)
    encoder = counter.encoder(np.full_like(mel_frames, 3000))
    prompt = ours.tokens + text_tokens
    logits = counter.logits(prompt)
    reading = encoder + ctc_decoder + fusion + counter.projector(ours.tokens) + counter.language_model(prompt) + logits
    return {
        "data": name,
        "target_length": length,
        "frames": ours.frames,
        "text_tokens": text_tokens,
        "paper": paper,
        "reading": reading / 1e12,
        "ours": ours.total / 1e12,
        "saved": {
            "logits": (logits - counter.logits(1)) / 1e12,
            "encoder": (encoder - ours.flops["encoder"]) / 1e12,
            "ctc": (ctc_decoder - ours.flops["ctc decoder"]) / 1e12,
        },
    }


def report(results: dict[str, Any]) -> str:
    """Returns the tables of results."""
    papers = [
        [
            f"{row['data']}, " + ("every frame" if row["target_length"] is None else f"L = {row['target_length']}"),
            f"{row['frames']} + {row['text_tokens']}",
            f"{row['paper']:.2f}",
            f"{row['reading']:.2f}",
            f"{row['reading'] / row['paper'] - 1:+.1%}",
            *(f"{row['saved'][part]:.2f}" for part in ("logits", "encoder", "ctc")),
            f"{row['ours']:.2f}",
            f"{row['ours'] / row['reading'] - 1:+.0%}",
        ]
        for row in results["papers"]
    ]
    unexplained = [
        f"{row['data']}'s {row['paper']:.2f} (with logits at the last position alone the count would be "
        f"{row['reading'] - row['saved']['logits']:.2f})"
        for row in results["papers"]
        if abs(row["reading"] / row["paper"] - 1) > 0.02
    ]
    lengths = [f"L = {length}" for length in LENGTHS]
    durations = [
        [
            f"{row['seconds']:,}",
            *(number(row["totals"][length] / row["totals"][EVERY_FRAME]) for length in lengths),
            *(number(flops / 1e12) for field in ("totals", "parts", "answers") for flops in row[field].values()),
        ]
        for row in results["durations"]
    ]
    saved = ["last-position logits", "encoder by duration", "one CTC matrix"]
    headings = [f"{length} / {EVERY_FRAME}" for length in lengths] + [*lengths, EVERY_FRAME]
    headings += [f"{part}, L = 400" for part in PARTS]
    headings += [f"{ANSWER_TOKENS - 1} more tokens, {name}" for name in ("L = 400", EVERY_FRAME)]
    return "\n\n".join(
        [
            "TFLOPs of a mean clip: in the paper, counted, what this package saves, and what it takes:",
            table(
                ["data, method", "frames + text", "paper", "counted", "off by", *saved, "this package", "less"], papers
            ),
            f"Our count is off by more than 2 % for: {'; '.join(unexplained) or 'none'}.",
            "TFLOPs to the first token by duration: first divided by those of every frame, then in full, by part, and "
            f"for the rest of an answer of {ANSWER_TOKENS} tokens:",
            table(["recording, s", *headings], durations),
        ]
    )


if __name__ == "__main__":
    main()
