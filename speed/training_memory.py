"""Compares what `fastlongspeech plan-training` counts with what a step really takes on this machine's CPU.

    python -m fastlongspeech.speed.training_memory --output speed/results/training-memory-cpu.json

Each case runs in a process of its own: random weights of a small size are loaded, one step of one row is trained, and
the highest resident memory of the process after loading is noted, less what it had before the step. The plan counts
weights apart, so that only the step's part is compared: activations, logits, gradients. The peak of one step with the
smallest batch is subtracted from that of a greater one, because libraries take memory of their own at the first step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# About a tenth of Qwen2-Audio-7B's width, with a vocabulary that lets the logits show.
SIZE: dict[str, Any] = {
    "audio_config": {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 128,
        "d_model": 256,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 1024,
    },
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "audio_token_index": 31_999,
    "model_type": "fastlongspeech",
    "ctc_vocab_size": 10_000,
}
CASES: dict[str, tuple[str, list[str], float]] = {
    "stage 1": ("ctc", ["--vocab_size", "10000"], 30.0),
    "stage 2, LoRA": ("dct", ["--tuning", "lora"], 30.0),
    "stage 2, LoRA, checkpointed": ("dct", ["--tuning", "lora", "--gradient_checkpointing"], 30.0),
    "stage 2, full": ("dct", ["--tuning", "full"], 30.0),
    "stage 2, full, checkpointed": ("dct", ["--tuning", "full", "--gradient_checkpointing"], 30.0),
    "stage 2, LoRA, 10 minutes": ("dct", ["--tuning", "lora", "--gradient_checkpointing"], 600.0),
    "stage 2, LoRA, 1 hour": ("dct", ["--tuning", "lora", "--gradient_checkpointing"], 3600.0),
}
ROWS = (2, 8)
LONG_ROWS = (1, 2)  # of recordings of minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--one", nargs=2, metavar=("CASE", "ROWS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]))))
        return
    results = {}
    print("| | rows | planned | measured |\n|---|---|---|---|")
    for case in arguments.cases:
        few, many = ROWS if CASES[case][2] <= 30 else LONG_ROWS
        found = []
        for rows in (few, many):
            command = [sys.executable, "-m", "fastlongspeech.speed.training_memory", "--one", case, str(rows)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
        planned, measured = (found[1][name] - found[0][name] for name in ("planned", "measured"))
        results[case] = {"rows": many - few, "planned": planned, "measured": measured}
        print(f"| {case} | {many - few} more | {planned / 1e6:.0f} MB | {measured / 1e6:.0f} MB |", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def measure(case: str, rows: int) -> dict[str, float]:
    """Returns the bytes that the plan counts for a step, and those that the process grew by in it."""
    import torch

    from .. import FastLongSpeechConfig, FastLongSpeechForConditionalGeneration
    from ..app.cost import TEXT_TOKENS
    from ..train import ctc, dct
    from ..train.plan import plan
    from ..train.stage import parse_settings

    stage, options, seconds = CASES[case]
    answer = 60
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SIZE))
        words = ["--model", folder, "--train_data", "-", "--output_dir", "-", "--use_cpu", "--optim", "sgd", *options]
        kind = ctc.CTCArguments if stage == "ctc" else dct.DCTArguments
        settings: Any
        settings, training = parse_settings(kind, words)
        step = plan(settings, training, seconds=seconds, answer_tokens=answer)
    torch.manual_seed(0)
    model: Any = FastLongSpeechForConditionalGeneration(FastLongSpeechConfig.from_dict(SIZE))
    if stage == "ctc":
        model.requires_grad_(False)
        model.model.language_model.layers = torch.nn.ModuleList()
        model.model.ctc_decoder.requires_grad_(True)
    else:
        model = dct.make_trainable(model, settings)
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    windows = max(1, round(seconds / 30))
    before = resident()
    inputs = {
        "input_features": torch.randn(rows * windows, 128, 3000),
        "feature_attention_mask": torch.ones(rows * windows, 3000, dtype=torch.int64),
        "windows_per_audio": torch.full((rows,), windows),
    }
    if stage == "ctc":
        inputs["ctc_labels"] = torch.randint(0, 10_000, (rows, 60))
    else:
        length = min(750, windows * 750)
        ids = torch.randint(0, 31_000, (rows, length + TEXT_TOKENS + answer))
        ids[:, 10 : 10 + length] = 31_999
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clamp(max=31_000)}
    model.train()
    model(**inputs).loss.backward()
    return {"planned": step.fixed + rows * step.per_row, "measured": peak() - before}


def resident() -> int:
    """Returns the bytes of this process in memory now."""
    return _status("VmRSS")


def peak() -> int:
    """Returns the most bytes of this process that were in memory at once."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


if __name__ == "__main__":
    main()
