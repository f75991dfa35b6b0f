"""Density and fusion, compared with the loop that a reader of the paper would write, and with the encoder.

    python -m fastlongspeech.speed.fusion --device cpu

The weights are random, of the model's sizes. Every recording is fused to 400 frames. The loop goes through the
recordings one by one. Its CTC decoder has two matrices, as in the paper's release, or their product. All results are
compared in float32. Where two methods choose the same span, its frame must be the same to 1e-4 of the largest element.
Where two similarities are equal but for rounding, the methods may choose different spans. The encoder's time is that
of one window (on a GPU of a batch of 8), times the recording's windows.

The last columns come from torch.profiler: the share of the time that goes into matrix products. On a CPU it is most of
our time. Up to 800 frames there is one round, and the loop with one matrix makes the same product as our code. "All
weighed" is our code with one change: it weighs all frames in every round. Up to 800 frames that changes nothing, so
the ratio there shows the measurement noise. At 7B sizes two matrices take 3.6 times the operations of their product.
The measured ratio is smaller for two reasons: the rest of the time is the same in both (mostly the softmax over the
vocabulary), and a CPU multiplies matrices of some sizes faster than others.

A profile led to two changes. In later rounds a CPU weighs only the frames that the round before has fused; "all
weighed" shows what that saves. And sums on a CPU use index_add_, whose order is fixed there. segment_reduce, which has
a fixed order on a GPU, takes ten times as long on a CPU.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastlongspeech import FastLongSpeechConfig, fusion_fastlongspeech
from fastlongspeech.app.markdown import table
from fastlongspeech.ctc_fastlongspeech import FastLongSpeechCTCDecoder
from fastlongspeech.fusion_fastlongspeech import FusionSettings, content_density, iterative_fusion
from fastlongspeech.modeling_fastlongspeech import FastLongSpeechEncoder

from .common import Benchmark, Goal, figure, free_bytes, load_config, number, parse, ratio

TARGET_LENGTH = 400
FRAMES = (750, 1500, 3319, 9000, 22_500, 90_000, 900_000)
BATCHES = (1, 8)
WINDOW_FRAMES = 750
CHUNK = 4096  # frames whose logits the loop holds at a time: all those of 10 hours would fill 36 GB
METHODS = OURS, TWO, ONE, ALL = "ours", "loop, two matrices", "loop, one matrix", "ours, all weighed every round"
ENCODER = "encoder"


def loop(recordings: Iterable[Tensor], target_length: int, density: Callable) -> list[tuple[Tensor, Tensor]]:
    """Returns Eq. 3 to 6 as the paper writes them: the frames of every recording, and where their spans begin."""
    results = []
    for frames in recordings:
        starts = torch.arange(len(frames), device=frames.device)
        while len(frames) > target_length:
            shorter = len(frames) // 2 if len(frames) > 2 * target_length else target_length
            weights = density(frames)
            hidden = frames.float()
            similarity = F.cosine_similarity(hidden[:-1], hidden[1:], dim=-1)
            glued = torch.zeros(len(frames), dtype=torch.bool, device=frames.device)
            glued[similarity.topk(len(frames) - shorter).indices + 1] = True
            span = (~glued).cumsum(0) - 1
            sums = hidden.new_zeros(shorter, hidden.shape[1]).index_add_(0, span, hidden * weights[:, None])
            weights = hidden.new_zeros(shorter).index_add_(0, span, weights)
            frames = (sums / (weights + 1e-7)[:, None]).to(frames.dtype)
            starts = starts[~glued]
        results.append((frames, starts))
    return results


class Densities(nn.Module):
    """The three ways to the same densities, with random weights."""

    def __init__(self, config: FastLongSpeechConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.audio_config.d_model)  # type: ignore[union-attr]
        self.decoder = FastLongSpeechCTCDecoder(config)
        projector, linear = self.decoder.projector, self.decoder.linear
        assert projector is not None
        with torch.no_grad():
            self.weight = nn.Parameter(linear.weight @ projector.weight)
            self.bias = nn.Parameter(linear.weight @ projector.bias)

    def ours(self, frames: Tensor) -> Tensor:
        return self.decoder.by_frame(frames, self.norm, content_density)

    def two(self, frames: Tensor) -> Tensor:
        chunks = self.norm(frames).split(CHUNK)
        return torch.cat([1 - self.decoder(chunk).float().softmax(-1)[:, -1] for chunk in chunks])

    def one(self, frames: Tensor) -> Tensor:
        chunks = self.norm(frames).split(CHUNK)
        return torch.cat([1 - F.linear(chunk, self.weight, self.bias).float().softmax(-1)[:, -1] for chunk in chunks])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse(__doc__ or "", argv, models=("7b", "7b"))
    device, dtype, quick = arguments.device, arguments.dtype, arguments.quick
    config = load_config(arguments.model)
    width = config.audio_config.d_model  # type: ignore[union-attr]
    torch.manual_seed(0)
    with torch.device(device):
        encoder = FastLongSpeechEncoder._from_config(config.audio_config, dtype=dtype).eval()
        exact = Densities(config).eval()
        density = Densities(config).to(dtype).eval()
    density.load_state_dict(exact.state_dict())
    windows = 1 if device == "cpu" else config.windows_per_batch
    features = torch.randn(windows, encoder.config.num_mel_bins, 3000, device=device, dtype=dtype)
    mel_frames = torch.full((windows,), 3000)

    benchmark = Benchmark("fusion", arguments)
    for batch in BATCHES:
        for count in (1200,) if quick else FRAMES:
            needed = 5 * 4.0 * batch * count * width
            calls: dict[str, Callable[[], Any]] = dict.fromkeys(METHODS, partial(refuse, needed))
            frames = None  # those of the case before are given back
            if needed <= free_bytes(device):
                frames = alike((batch, count, width), device).to(dtype)
                calls = {
                    OURS: partial(fuse, frames, density),
                    TWO: partial(loop, frames, TARGET_LENGTH, density.two),
                    ONE: partial(loop, frames, TARGET_LENGTH, density.one),
                    ALL: partial(fuse_weighing_all, frames, density),
                }
            work = dict.fromkeys(calls, float(batch * count))
            needs = dict.fromkeys(calls, needed)
            if batch == 1:
                calls[ENCODER] = partial(encoder, features, mel_frames)
                work[ENCODER], needs[ENCODER] = 0, 0
            row = benchmark.measure({"batch": batch, "frames": count, "windows encoded": windows}, calls, work, needs)
            if frames is not None and "runs" in row["calls"][TWO] and "equal_spans" not in row:
                largest, equal = compare(frames.float(), exact)
                benchmark.note(row, largest_difference=largest, equal_spans=equal)
                if largest > 1e-4 or equal < 0.99:
                    sys.exit(
                        f"the results differ by {largest:.1e}, or in {1 - equal:.1%} of their spans: {row['case']}"
                    )
            if frames is not None and device == "cpu" and "products" not in row:
                timed = [name for name in METHODS if "runs" in row["calls"][name]]
                benchmark.note(row, products={name: share_of_products(calls[name]) for name in timed})
    print(report(benchmark.results))
    return benchmark.results


def refuse(needed: float) -> None:
    """Stands for a call whose frames do not fit into memory.

    Raises:
        RuntimeError: always; it says how many bytes it needs.
    """
    raise RuntimeError(f"needs {needed / 1e9:.0f} GB")


def alike(shape: tuple[int, int, int], device: str) -> Tensor:
    """Returns random frames whose neighbours are alike, as in speech."""
    batch, count, width = shape
    generator = torch.Generator(device).manual_seed(count)
    slow = torch.randn(batch, count // 4 + 1, width, generator=generator, device=device)
    frames = slow.repeat_interleave(4, dim=1)[:, :count]
    return frames.add_(torch.randn(frames.shape, generator=generator, device=device), alpha=0.5)


def fuse(frames: Tensor, density: Densities) -> Any:
    """Returns what the model makes of a batch of recordings without padding."""
    lengths = torch.full((len(frames),), frames.shape[1])
    return iterative_fusion(frames, lengths, TARGET_LENGTH, FusionSettings(density.ours))


def fuse_weighing_all(frames: Tensor, density: Densities) -> Any:
    """Returns the same, with the densities of all frames taken anew in every round."""

    def weigh_all(_: Tensor, fresh: Tensor, frames: Tensor, members: Tensor, weights_fn: Callable) -> Tensor:
        return weights_fn(frames, members)

    with patch.object(fusion_fastlongspeech, "renew_weights", weigh_all):
        return fuse(frames, density)


@torch.no_grad()
def compare(frames: Tensor, density: Densities) -> tuple[float, float]:
    """Returns by how much our frames differ from the loops' at most, and the share of spans that are the same."""
    fused = fuse(frames, density)
    same, spans, largest = 0, 0, 0.0
    for of_loop in (density.two, density.one):
        for index, (expected, starts) in enumerate(loop(frames, TARGET_LENGTH, of_loop)):
            end = torch.full_like(starts[:1], frames.shape[1])
            ends = torch.cat((starts[1:], end))
            ours = fused.spans[index]
            place = torch.searchsorted(ours[:, 0].contiguous(), starts).clamp(max=len(ours) - 1)
            equal = (ours[place] == torch.stack((starts, ends), dim=1)).all(1)
            difference = (fused.frames[index][place] - expected)[equal].abs().max() / expected.abs().max()
            same, spans, largest = same + int(equal.sum()), spans + len(starts), max(largest, float(difference))
    return largest, same / spans


@torch.no_grad()
def share_of_products(call: Callable[[], Any]) -> float:
    """Returns the share of a call's time on a CPU that goes into matrix products, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    seconds = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    return sum(seconds.get(name, 0.0) for name in ("aten::addmm", "aten::mm")) / sum(seconds.values())


def share_of_encoder(row: dict[str, Any]) -> float | None:
    """Returns the time of density and fusion in terms of the encoder's for the whole recording, or None."""
    of_windows = ratio(row, OURS, ENCODER)
    if of_windows is None:
        return None
    return of_windows * row["case"]["windows encoded"] * WINDOW_FRAMES / row["case"]["frames"]


def goals(results: dict[str, Any]) -> list[Goal]:
    """Returns what was to be reached: the worst figure of all cases that were measured."""
    most = 0.05 if "cuda" in results["command"] else 0.04
    shares = measured(results, share_of_encoder)
    goals = []
    if shares:
        worst, case = max(shares)
        said = f"{worst:.1%} at most ({case})"
        goals.append(Goal("density and fusion / encoder", f"at most {most:.0%}", said, worst <= most))
    real_size = results.get("model", "7b") == "7b"  # in smaller models the product of two matrices saves less
    for loop, least in ((TWO, 3), (ONE, 1)) if real_size else ((ONE, 1),):
        ratios = measured(results, partial(ratio, name=loop, to=OURS))
        if ratios:
            worst, case = min(ratios)
            goals.append(Goal(f"{loop} / ours", f"at least {least}", f"{worst:.2f} at least ({case})", worst >= least))
    return goals


def measured(results: dict[str, Any], value: Callable[[dict[str, Any]], float | None]) -> list[tuple[float, str]]:
    """Returns a figure of every case that has it, and what case that is."""
    found = []
    for row in results["rows"]:
        figure = value(row)
        if figure is not None:
            found.append((figure, f"{row['case']['frames']:,} frames, batch {row['case']['batch']}"))
    return found


def report(results: dict[str, Any]) -> str:
    """Returns the tables of results."""
    rows = []
    for row in results["rows"]:
        share = share_of_encoder(row)
        rows.append(
            [
                f"{row['case']['frames']:,}",
                str(row["case"]["batch"]),
                "" if share is None else f"{share:.1%}",
                number(ratio(row, TWO, OURS)),
                number(ratio(row, ONE, OURS)),
                number(ratio(row, ALL, OURS)),
                *(figure(row, name, "seconds") for name in METHODS),
                *(figure(row, name, "bytes", 1e6) for name in METHODS),
                *(f"{row['products'][name]:.0%}" if name in row.get("products", {}) else "" for name in METHODS),
            ]
        )
    headings = ["frames", "batch", "share of the encoder's time"]
    headings += [f"{name} / ours" for name in ("two matrices", "one matrix", "all weighed")]
    for what in ("s", "MB", "in matrix products"):
        headings += [f"{name}, {what}" for name in ("ours", "two", "one", "all weighed")]
    largest = max((row["largest_difference"] for row in results["rows"] if "largest_difference" in row), default=None)
    fewest = min((row["equal_spans"] for row in results["rows"] if "equal_spans" in row), default=None)
    checked = ""
    if largest is not None and fewest is not None:
        checked = (
            f"\n\nThe frames differ by at most {largest:.1e}, where the spans are equal; {fewest:.2%} of them are."
        )
    return table(headings, rows) + checked


if __name__ == "__main__":
    main()
