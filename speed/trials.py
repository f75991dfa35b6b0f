"""Changes that might speed up the encoder, each run in turn with the encoder as it is.

    python -m fastlongspeech.speed.trials --device cpu

Windows of 30 s, random weights. A trial pays if it saves 5 % of the time or more. The largest batch is what half of
the free memory holds, at most 64 windows on a GPU and 16 on a CPU, where more take minutes. Trials about the
convolutions are measured on the convolutions alone. The first of them shows the convolutions' share of the encoder's
time, and no trial there can save more than that. Half precision on a CPU is tried on one window. Mel features on the
GPU are in `frontend.py`.

Kept:

- On a CPU a batch holds a minute of audio at most. Larger batches are no faster and take more memory.
- Positions past the end of the audio are left out (see "Encoder").
- Mel features are made one window at a time (see "Decoding and mel features").
- The CTC decoder's two matrices are multiplied ahead, and a CPU weighs only fused frames anew (see "Density and
  fusion").

All that does not pay, by the table, is dropped. Here freed memory goes back to the system, as it does for users. The
other benchmarks keep it, which makes their times steadier.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlongspeech import windows_fastlongspeech
from fastlongspeech.app.markdown import table
from fastlongspeech.extractor_fastlongspeech import SpeechExtractor
from fastlongspeech.modeling_fastlongspeech import FastLongSpeechEncoder

from .common import (
    MEL_FRAMES_PER_WINDOW,
    Benchmark,
    figure,
    free_bytes,
    keep_freed_memory,
    load_config,
    number,
    parse,
    ratio,
    tiny_processor,
    windows_of,
)
from .frontend import write_noise

AS_IS = "as it is"
SHARE = "convolutions alone"
PAYS = 0.95  # of the time of the encoder as it is


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse(__doc__ or "", argv, models=("tenth", "7b"))
    device, quick = arguments.device, arguments.quick
    config = load_config(arguments.model)
    usual = config.windows_per_batch
    if device == "cpu":
        usual = windows_fastlongspeech.CPU_MEL_FRAMES // MEL_FRAMES_PER_WINDOW
    torch.manual_seed(0)
    with torch.device(device):
        encoder = FastLongSpeechEncoder._from_config(config.audio_config, dtype=arguments.dtype).eval()
    benchmark = Benchmark("trials", arguments, keep_memory=False)

    def measure(name: str, trial: Callable[[], Any], as_it_is: Callable[[], Any]) -> None:
        benchmark.measure({"trial": name}, {AS_IS: as_it_is, name: trial})

    def encode(count: int, batch: int = usual, encoder: Any = encoder) -> Callable[[], Any]:
        """Returns a call that encodes `count` windows in batches."""
        windows = windows_of(30 * count, encoder.config.num_mel_bins, device, arguments.dtype)

        def call() -> None:
            with patch.object(windows_fastlongspeech, "CPU_MEL_FRAMES", batch * MEL_FRAMES_PER_WINDOW):
                encode_with(encoder, batch, **windows)

        return call

    most = 4 if quick else memory_batch(encoder, device)
    for size in sorted({*(size for size in (1, 2, 4, 8, 16, 32) if size < most), most}):
        if size != usual:
            measure(f"batches of {size}, not {usual}", encode(max(size, usual), size), encode(max(size, usual)))
    few = 1 if device == "cpu" else usual
    for dtype in (torch.bfloat16,) if quick else (torch.float32, torch.bfloat16, torch.float16):
        if dtype != encoder.dtype:
            name = str(dtype).removeprefix("torch.")
            measure(name, encode(few, few, copy.deepcopy(encoder).to(dtype)), encode(few, few))

    if device == "cpu":
        measure("freed memory kept", with_freed_memory(True, encode(usual)), with_freed_memory(False, encode(usual)))
        keep_freed_memory(False)

    first, last = encoder.conv1, encoder.conv2
    batch = windows_of(30 * usual, encoder.config.num_mel_bins, device, arguments.dtype)["input_features"]

    def convolve() -> Tensor:
        return F.gelu(last(F.gelu(first(batch))))

    measure(SHARE, convolve, encode(usual))
    measure("convolutions, channels last", lambda: channels_last(batch, first, last), convolve)
    if not quick:  # takes minutes
        measure("convolutions, compiled (fused with GELU)", torch.compile(convolve, dynamic=False), convolve)
        compiled = copy.deepcopy(encoder)
        for layer in compiled.layers:
            layer.compile(dynamic=False)
        measure("torch.compile of the layers", encode(usual, encoder=compiled), encode(usual))
    with tempfile.TemporaryDirectory() as folder:
        path = write_noise(Path(folder, "noise.flac"), 30 * 2 * usual, 16_000, 1)
        meanwhile, in_turn = front_end_pair(encoder, path, usual)
        measure("decoding and features of the next windows meanwhile", meanwhile, in_turn)
    if device != "cpu":
        overlapped, copied = transfer_pair(encoder, device, usual)
        measure("pinned transfer of the next windows meanwhile", overlapped, copied)
    print(report(benchmark.results))
    return benchmark.results


def memory_batch(encoder: Any, device: str) -> int:
    """Returns how many windows can be encoded at once in half of the memory that is free, at most 64; 16 on a CPU."""
    config = encoder.config
    widest = max(config.encoder_ffn_dim, 4 * config.d_model)
    of_window = 1500.0 * (widest + 4 * config.d_model) * encoder.dtype.itemsize
    return max(1, min(16 if device == "cpu" else 64, int(free_bytes(device) / 2 / of_window)))


def with_freed_memory(keep: bool, call: Callable[[], Any]) -> Callable[[], Any]:
    """Returns a call in a process that keeps the memory it frees, or gives it back to the system."""

    def measured() -> None:
        keep_freed_memory(keep)
        call()

    return measured


def channels_last(features: Tensor, first: torch.nn.Conv1d, last: torch.nn.Conv1d) -> Tensor:
    """Returns what the convolutions make of windows, computed with the channels of a position side by side."""
    hidden = features[:, :, None].to(memory_format=torch.channels_last)
    for conv in (first, last):
        weight = conv.weight[:, :, None].to(memory_format=torch.channels_last)
        hidden = F.gelu(F.conv2d(hidden, weight, conv.bias, (1, conv.stride[0]), (0, 1)))
    return hidden[:, :, 0]


class EncoderAlone(SpeechExtractor):
    """An encoder without a model around it."""

    def __init__(self, encoder: Any, windows_per_batch: int) -> None:
        self.audio_tower = encoder
        self.config = SimpleNamespace(windows_per_batch=windows_per_batch, windows=windows_fastlongspeech.WINDOWS)

    def encode_windows(self, input_features: Tensor, mel_frames: Tensor) -> Tensor:
        return self.audio_tower(input_features, mel_frames).last_hidden_state


def encode_with(encoder: Any, windows_per_batch: int, *inputs: Tensor, **named: Tensor) -> None:
    """Encodes recordings, so many windows at a time; the arguments are those of `SpeechExtractor.encode`."""
    EncoderAlone(encoder, windows_per_batch).encode(*inputs, **named)


def front_end_pair(encoder: Any, path: Path, size: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns two ways to encode a file, `size` windows at a time: the next are read meanwhile, and in turn."""
    processor = tiny_processor(encoder.config.num_mel_bins)
    samples = size * 480_000
    starts = range(0, soundfile.info(path).frames, samples)

    def read(start: int) -> Any:
        part, rate = soundfile.read(path, samples, start, dtype="float32")
        return processor(audio=part, sampling_rate=rate)

    def encode(inputs: Any) -> None:
        inputs = inputs.to(encoder.device)
        encode_with(encoder, size, inputs["input_features"], inputs["feature_attention_mask"])

    def in_turn() -> None:
        for start in starts:
            encode(read(start))

    def meanwhile() -> None:
        with ThreadPoolExecutor(1) as pool:
            for coming in [pool.submit(read, start) for start in starts]:
                encode(coming.result())

    return meanwhile, in_turn


def transfer_pair(encoder: Any, device: str, size: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns two ways to encode four batches of windows in main memory: the next is copied meanwhile, and in turn."""
    features, mask, _ = windows_of(30 * size, encoder.config.num_mel_bins, "cpu", encoder.dtype).values()
    pinned, mask, stream = features.pin_memory(), mask.to(device), torch.cuda.Stream(device)

    def in_turn() -> None:
        for _ in range(4):
            encode_with(encoder, size, features.to(device), mask)

    def copy_next() -> Tensor:
        with torch.cuda.stream(stream):
            return pinned.to(device, non_blocking=True)

    def meanwhile() -> None:
        coming = copy_next()
        for following in (True, True, True, False):
            torch.cuda.current_stream(device).wait_stream(stream)
            here = coming
            here.record_stream(torch.cuda.current_stream(device))
            if following:
                coming = copy_next()
            encode_with(encoder, size, here, mask)

    return meanwhile, in_turn


def report(results: dict[str, Any]) -> str:
    """Returns the table of results."""
    rows = []
    for row in results["rows"]:
        name = row["case"]["trial"]
        measured = ratio(row, name, AS_IS)
        pays = "" if measured is None or name == SHARE else "yes" if measured <= PAYS else "no"
        rows.append(
            [
                name,
                number(measured),
                pays,
                *(figure(row, call, "seconds") for call in (name, AS_IS)),
                *(figure(row, call, "bytes", 1e6) for call in (name, AS_IS)),
            ]
        )
    return table(["trial", "trial / as it is", "pays", "trial, s", "as it is, s", "trial, MB", "as it is, MB"], rows)


if __name__ == "__main__":
    main()
