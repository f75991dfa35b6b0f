"""From a file to the first token: seconds of each part, and memory beyond weights and waveform.

    python -m fastlongspeech.speed.recording --device cpu

FLAC files of noise, the longest of ten hours, go through everything that `fastlongspeech ask` does. One second of
audio warms up, then every duration runs once, so `--repeats` and `--limit` have no meaning here. Memory is that of
the process and, on a GPU, also the GPU's.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastlongspeech import load_recording
from fastlongspeech.app.markdown import table

from .common import Benchmark, Goal, PeakMemory, benchmark_model, growth, load_config, number, parse, tiny_processor
from .frontend import write_noise

SECONDS = (60, 600, 3600, 36_000)
PARTS = ("decoding", "features", "first token")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse(__doc__ or "", argv, models=("tenth", "7b"), seconds=SECONDS)
    device = arguments.device
    processor = tiny_processor(load_config(arguments.model).audio_config.num_mel_bins)  # type: ignore[union-attr]
    model = benchmark_model(arguments.model, device, arguments.dtype, audio_token_index=processor.audio_token_id)
    benchmark = Benchmark("recording", arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = write_noise(Path(folder, "recording.flac"), 1, 16_000, 1)
        model.generate(**prepare(processor, load_recording(path)).to(device), max_new_tokens=1, do_sample=False)
        durations = arguments.seconds or ((1, 31) if arguments.quick else SECONDS)
        for seconds in tqdm(durations, unit="recording", leave=False, disable=None):
            if any(row["case"]["seconds"] == seconds for row in benchmark.results["rows"]):
                continue
            write_noise(path, seconds, 16_000, 1)
            times = [time.perf_counter()]
            with PeakMemory("cpu") as host, PeakMemory(device) as memory:
                samples = load_recording(path)
                times.append(time.perf_counter())
                inputs = prepare(processor, samples)
                times.append(time.perf_counter())
                model.generate(**inputs.to(device), max_new_tokens=1, do_sample=False)
                times.append(time.perf_counter())
                del inputs
            parts = dict(zip(PARTS, (end - start for start, end in zip(times, times[1:], strict=False)), strict=True))
            peaks = {"host": None if host.bytes is None else host.bytes - samples.nbytes}
            if device != "cpu":
                peaks["GPU"] = memory.bytes
            del samples  # or the next duration's memory would count from here
            benchmark.add({"case": {"seconds": seconds}, "parts": parts, "bytes": peaks})
    print(report(benchmark.results))
    return benchmark.results


def prepare(processor: Any, samples: Any) -> Any:
    """Returns the inputs of the model for a question about a recording."""
    turn = {
        "role": "user",
        "content": [{"type": "audio", "audio": samples}, {"type": "text", "text": "What is said?"}],
    }
    return processor.apply_chat_template(
        [turn], add_generation_prompt=True, tokenize=True, return_dict=True, sampling_rate=16_000
    )


def goals(results: dict[str, Any]) -> list[Goal]:
    """Returns what was to be reached."""
    times = {row["case"]["seconds"]: sum(row["parts"].values()) for row in results["rows"]}
    goals = growth("from a file to the first token", times)
    for row in results["rows"]:
        known = [peak for peak in row["bytes"].values() if peak is not None]
        if row["case"]["seconds"] == 3600 and known:
            most = max(known) / 1e9
            goals.append(Goal("memory beyond weights and waveform, 1 h", "at most 2 GB", f"{most:.2f} GB", most <= 2))
        if row["case"]["seconds"] == 36_000:
            seconds = sum(row["parts"].values())
            goals.append(Goal("first token of 10 h", "comes", f"after {seconds:,.0f} s", True))
    return goals


def series(results: dict[str, Any]) -> tuple[dict[str, list], dict[str, list]]:
    """Returns the seconds of every part and the MB of every memory against the seconds of the recording."""
    rows = results["rows"]
    seconds = {part: [(row["case"]["seconds"], row["parts"][part]) for row in rows] for part in PARTS}
    seconds["together"] = [(row["case"]["seconds"], sum(row["parts"].values())) for row in rows]
    memory = {
        name: [(row["case"]["seconds"], row["bytes"][name] / 1e6) for row in rows if row["bytes"][name]]
        for name in rows[0]["bytes"]
    }
    return seconds, memory


def report(results: dict[str, Any]) -> str:
    """Returns the table of results."""
    memories = list(results["rows"][0]["bytes"])
    rows = [
        [
            f"{row['case']['seconds']:,}",
            number(row["case"]["seconds"] / sum(row["parts"].values())),
            *(number(row["parts"][part]) for part in PARTS),
            *(number(None if row["bytes"][name] is None else row["bytes"][name] / 1e6) for name in memories),
        ]
        for row in results["rows"]
    ]
    headings = ["recording, s", "times real time", *(f"{part}, s" for part in PARTS)]
    return table(headings + [f"{name}, MB" for name in memories], rows)


if __name__ == "__main__":
    main()
