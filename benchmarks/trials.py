"""What might speed up the encoder, each in an interleaved pair with the encoder as it is.

    python -m fastlongspeech.benchmarks.trials --device cpu

Eight 30 s windows (32 on a GPU), random weights. What pays 5 % or more is worth keeping. Mel features on the GPU are
in `frontend.py`.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlongspeech.encoder_fastlongspeech import FastLongSpeechEncoder
from fastlongspeech.markdown import table

from .common import Benchmark, dtype_of, figure, load_config, number, parse, ratio, tiny_processor, windows_of

AS_IS = "as it is"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse(__doc__ or "", argv, models=("tenth", "7b"))
    device, quick = arguments.device, arguments.quick
    config = load_config(arguments.model)
    torch.manual_seed(0)
    with torch.device(device):
        encoder = FastLongSpeechEncoder._from_config(config.audio_config, dtype=dtype_of(device)).eval()
    count = 2 if quick else 8 if device == "cpu" else 32
    inputs = windows_of(30 * count, encoder.config.num_mel_bins, device)
    features, mask, windows = inputs.values()

    def encode(encoder: Any = encoder, features: Tensor = features, batch: int = config.windows_per_batch) -> Tensor:
        return encoder.encode_recordings(features, mask, windows, batch)[0]

    trials: dict[str, Callable[[], Any]] = {
        f"batches of {size}": partial(encode, batch=size)
        for size in (1, 2, 4, 16, 32)
        if size != config.windows_per_batch and size <= count
    }
    if not quick:  # takes minutes
        compiled = copy.deepcopy(encoder)
        for layer in compiled.layers:
            layer.compile(dynamic=False)
        trials["torch.compile of the layers"] = partial(encode, compiled)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if dtype != encoder.dtype:
            other = copy.deepcopy(encoder).to(dtype)
            trials[str(dtype).removeprefix("torch.")] = partial(encode, other)
    benchmark = Benchmark("trials", arguments)
    for name, trial in trials.items():
        benchmark.measure({"trial": name}, {AS_IS: encode, name: trial})

    first, last = encoder.conv1, encoder.conv2
    batch = features[: config.windows_per_batch]
    pairs: dict[str, dict[str, Callable[[], Any]]] = {
        "convolutions, channels last": {
            AS_IS: lambda: F.gelu(last(F.gelu(first(batch)))),
            "convolutions, channels last": lambda: channels_last(batch, first, last),
        },
        "convolutions alone": {
            AS_IS: lambda: encode(features=batch),
            "convolutions alone": lambda: F.gelu(last(F.gelu(first(batch)))),
        },
        "features of the next windows meanwhile": front_end_pair(encoder, config, count),
    }
    if device != "cpu":
        pinned = features.cpu().pin_memory()
        pageable = features.cpu()
        pairs["pinned transfer"] = {
            AS_IS: lambda: encode(features=pageable.to(device)),
            "pinned transfer": lambda: encode(features=pinned.to(device, non_blocking=True)),
        }
    for name, pair in pairs.items():
        benchmark.measure({"trial": name}, pair)
    print(report(benchmark.results))
    return benchmark.results


def channels_last(features: Tensor, first: torch.nn.Conv1d, last: torch.nn.Conv1d) -> Tensor:
    """Returns what the convolutions make of windows, computed with the channels of a position side by side."""
    hidden = features[:, :, None].to(memory_format=torch.channels_last)
    for conv in (first, last):
        weight = conv.weight[:, :, None].to(memory_format=torch.channels_last)
        hidden = F.gelu(F.conv2d(hidden, weight, conv.bias, (1, conv.stride[0]), (0, 1)))
    return hidden[:, :, 0]


def front_end_pair(encoder: Any, config: Any, count: int) -> dict[str, Callable[[], Any]]:
    """Returns features and encoding one after the other, and features while the windows before are encoded."""
    processor = tiny_processor(encoder.config.num_mel_bins)
    size = config.windows_per_batch * 480_000
    samples = np.random.default_rng(0).standard_normal(count * 480_000, dtype=np.float32)
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]

    def features(part: np.ndarray) -> Any:
        return processor(audio=part, sampling_rate=16_000)

    def encode(inputs: Any) -> None:
        inputs = inputs.to(encoder.device)
        encoder.encode_recordings(
            inputs["input_features"], inputs["feature_attention_mask"], None, config.windows_per_batch
        )

    def in_turn() -> None:
        for part in parts:
            encode(features(part))

    def meanwhile() -> None:
        with ThreadPoolExecutor(1) as pool:
            coming = [pool.submit(features, part) for part in parts]
            for inputs in coming:
                encode(inputs.result())

    return {AS_IS: in_turn, "features of the next windows meanwhile": meanwhile}


def report(results: dict[str, Any]) -> str:
    """Returns the table of results."""
    rows = []
    for row in results["rows"]:
        name = row["case"]["trial"]
        rows.append(
            [
                name,
                number(ratio(row, name, AS_IS)),
                *(figure(row, call, "seconds") for call in (name, AS_IS)),
                *(figure(row, call, "bytes", 1e6) for call in (name, AS_IS)),
            ]
        )
    return table(["trial", "trial / as it is", "trial, s", "as it is, s", "trial, MB", "as it is, MB"], rows)


if __name__ == "__main__":
    main()
