"""What the benchmarks share: options, models of random weights, the stopwatch, and the file of results."""

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from math import log
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import pre_tokenizers
from tqdm import tqdm
from transformers import Qwen2Tokenizer, WhisperFeatureExtractor

from fastlongspeech import FastLongSpeechConfig, FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from fastlongspeech.app.sizes import QWEN2_AUDIO_7B

RESULTS = Path(__file__).parent / "results"
REPEATS, LIMIT = 5, 120.0
DTYPES = ("float32", "bfloat16", "float16")
FRAMES_PER_SECOND = 25
MEL_FRAMES_PER_SECOND = 100
MEL_FRAMES_PER_WINDOW = 3000

# A tenth of the parameters: every width and vocabulary of Qwen2-Audio-7B times 5/16, as many layers, heads as wide.
TENTH: dict[str, Any] = {
    "audio_config": QWEN2_AUDIO_7B["audio_config"]
    | {"d_model": 400, "encoder_ffn_dim": 1600, "encoder_attention_heads": 5},
    "text_config": QWEN2_AUDIO_7B["text_config"]
    | {"vocab_size": 48_760, "hidden_size": 1280, "intermediate_size": 3440}
    | {"num_attention_heads": 10, "num_key_value_heads": 10},
    "audio_token_index": 48_000,
    "ctc_vocab_size": 3125,
}
# For `--quick`.
TINY: dict[str, Any] = {
    "audio_config": QWEN2_AUDIO_7B["audio_config"]
    | {"d_model": 16, "encoder_ffn_dim": 32, "encoder_attention_heads": 2, "encoder_layers": 1},
    "text_config": QWEN2_AUDIO_7B["text_config"]
    | {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    | {"num_attention_heads": 2, "num_key_value_heads": 2},
    "audio_token_index": 11,  # as low as in the demo model
    "ctc_vocab_size": 30,
}
SIZES = {"7b": QWEN2_AUDIO_7B, "tenth": TENTH, "tiny": TINY}


def parse(
    description: str,
    argv: Sequence[str] | None,
    models: tuple[str, str] | None = None,
    seconds: Sequence[int] | None = None,
) -> argparse.Namespace:
    """Returns the options of a benchmark; `dtype` is torch's.

    Args:
        description: what `--help` says.
        argv: the command line; `sys.argv[1:]` when None.
        models: defaults of `--model` on a CPU and on a GPU; without them there is no such option.
        seconds: durations that `--seconds` may choose; without them there is no such option.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=found, help="such as cpu, cuda or cuda:1 (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--repeats", type=int, default=REPEATS, metavar="N", help="timed runs after one to warm up")
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        metavar="S",
        help="skip cases where one run would take longer than S seconds",
    )
    parser.add_argument("--output", type=Path, help="file of results (default: in speed/results/; --quick: none)")
    parser.add_argument("--resume", action="store_true", help="keep the cases that the file of results has")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one run, to see that it works")
    if models is not None:
        sizes = ", ".join(SIZES)
        parser.add_argument(
            "--model", help=f"{sizes} (random weights) or a folder (default: {models[found != 'cpu']})"
        )
    if seconds is not None:
        parser.add_argument(
            "--seconds", type=int, nargs="+", choices=seconds, metavar="S", help="only recordings of S"
        )
    arguments = parser.parse_args(argv)
    arguments.dtype = getattr(torch, arguments.dtype or default_dtype(arguments.device))
    if arguments.quick:
        arguments.repeats = 1
    if models is not None and arguments.model is None:
        arguments.model = "tiny" if arguments.quick else models[arguments.device != "cpu"]
    return arguments


def default_dtype(device: str) -> str:
    """Returns what models run in unless another `--dtype` is given."""
    return "float32" if device == "cpu" else "bfloat16"


def load_config(name: str, **fields: Any) -> FastLongSpeechConfig:
    """Returns the configuration of a model of `SIZES` or of one in a folder, with these fields changed."""
    if name in SIZES:
        return FastLongSpeechConfig(**(SIZES[name] | fields))
    return FastLongSpeechConfig.from_pretrained(name, **fields)


def benchmark_model(name: str, device: str, dtype: torch.dtype, **fields: Any) -> Any:
    """Returns a model of `SIZES` with random weights, or the one in a folder, that answers without ending.

    Args:
        name: of `SIZES`, or a folder.
        device, dtype: where it is put, and in what.
        fields: of its configuration, to be changed.
    """
    if name in SIZES:
        torch.manual_seed(0)
        config = load_config(name, **fields)
        with torch.device(device):
            model: Any = FastLongSpeechForConditionalGeneration._from_config(config, dtype=dtype)
    else:
        model = FastLongSpeechForConditionalGeneration.from_pretrained(name, dtype=dtype, **fields).to(device)
    model.generation_config.eos_token_id = None
    return model.eval()


def tiny_processor(mel_bins: int) -> FastLongSpeechProcessor:
    """Returns a processor whose tokens are bytes: tokenizing takes no time to speak of in any case."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
    vocabulary = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token=special[0], extra_special_tokens=special[1:])
    return FastLongSpeechProcessor(WhisperFeatureExtractor(feature_size=mel_bins), tokenizer)


def windows_of(
    seconds: float, mel_bins: int, device: str, dtype: torch.dtype, recordings: int = 1
) -> dict[str, torch.Tensor]:
    """Returns model inputs for recordings of noise, all of the same duration."""
    left = round(seconds * MEL_FRAMES_PER_SECOND)
    mel_frames = [min(MEL_FRAMES_PER_WINDOW, left - start) for start in range(0, left, MEL_FRAMES_PER_WINDOW)]
    mask = torch.arange(MEL_FRAMES_PER_WINDOW) < torch.tensor(mel_frames * recordings)[:, None]
    generator = torch.Generator(device).manual_seed(0)
    shape = (len(mask), mel_bins, MEL_FRAMES_PER_WINDOW)
    return {
        "input_features": torch.randn(shape, generator=generator, device=device, dtype=dtype),
        "feature_attention_mask": mask.long().to(device),
        "windows_per_audio": torch.tensor([len(mel_frames)] * recordings, device=device),
    }


class Goal(NamedTuple):
    """What a benchmark was to reach: the ``figure``, what was ``wanted``, ``measured``, and whether it was ``met``."""

    figure: str
    wanted: str
    measured: str
    met: bool


def growth(name: str, times: Mapping[int, float]) -> list[Goal]:
    """Returns the goal that time grows no faster than duration; no goal without two recordings of ten minutes or more.

    In shorter ones the part that does not depend on duration weighs too much.

    Args:
        name: what was measured.
        times: seconds that a recording took, by the seconds that it lasts.
    """
    long = {duration: time for duration, time in times.items() if duration >= 600}
    if len(long) < 2:
        return []
    first, last = min(long), max(long)
    power = log(long[last] / long[first]) / log(last / first)
    wanted, said = "time grows no faster than duration^1, to 0.1", f"duration^{power:.2f}"
    return [Goal(f"{name}, {first} s to {last} s", wanted, said, power <= 1.1)]


def keep_freed_memory(keep: bool = True) -> bool:
    """Keeps glibc from returning freed memory to the system, so that page faults do not distort timings.

    Memory of a large tensor normally goes back to the system when it is freed, and every page of the next tensor has
    to be made anew. On a virtual machine the time for that can change within minutes.

    Args:
        keep: False undoes it: memory of tensors above 32 MB goes back. That is where glibc's own thresholds end up
            (mallopt(3)).

    Returns:
        Whether freed memory is kept now; never without glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_threshold, mmap_most = -1, -3, -4
    if keep:
        return bool(mallopt(mmap_most, 0) and mallopt(trim_threshold, -1))
    mallopt(mmap_most, 65_536)
    mallopt(mmap_threshold, 32 << 20)
    mallopt(trim_threshold, 64 << 20)
    return False


class PeakMemory:
    """Counts the most bytes that this process (`"cpu"`, Linux only) or a GPU held inside, beyond those before.

    `bytes` is None where it is not known.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif Path("/proc/self/clear_refs").exists():
            ctypes.CDLL(None).malloc_trim(0)  # gives back what was freed, which would be taken again unseen
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        if self.device != "cpu":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif Path("/proc/self/clear_refs").exists():
            self.bytes = max(0, _status("VmHWM") - self._before)


def _status(field: str) -> int:
    """Returns the bytes in a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}.")


def free_bytes(device: str) -> float:
    """Returns the bytes that are free; infinity where it is not known."""
    if device != "cpu":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    if not Path("/proc/meminfo").exists():
        return float("inf")
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


class Benchmark:
    """Measures cases and keeps what it measured: the machine, and a row for every case.

    A row is `{"case": ..., "calls": {name: {"seconds": median, "runs": [...], "bytes": peak}}}`. A call that was not
    run has `{"left_out": why}` instead of its figures. The file is written after every case.

    Args:
        name: of the benchmark, begins the name of the file.
        arguments: see `parse`.
        keep_memory: whether to keep freed memory on a CPU, see `keep_freed_memory`.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, keep_memory: bool = True) -> None:
        self.arguments = arguments
        self.keeps_memory = arguments.device == "cpu" and keep_memory and keep_freed_memory()
        model = getattr(arguments, "model", None)
        dtype = str(arguments.dtype).removeprefix("torch.")
        seconds = getattr(arguments, "seconds", None)
        parts = [name, arguments.device.split(":")[0], *([Path(model).name] if model else [])]
        self.output = arguments.output
        if self.output is None and not arguments.quick:
            self.output = RESULTS / f"{'-'.join(parts)}.json"
        self.results: dict[str, Any] = {
            "benchmark": name,
            "model": model,
            "command": " ".join(
                [f"python -m fastlongspeech.speed.{name} --device {arguments.device}"]
                + ([f"--model {model}"] if model else [])
                + ([f"--dtype {dtype}"] if dtype != default_dtype(arguments.device) else [])
                + ([f"--seconds {' '.join(map(str, seconds))}"] if seconds else [])
                + ([f"--repeats {arguments.repeats}"] if arguments.repeats != REPEATS else [])
                + ([f"--limit {arguments.limit:g}"] if arguments.limit != LIMIT else [])
            ),
            "machine": describe_machine(arguments.device, dtype)
            | ({"keeps_freed_memory": True} if self.keeps_memory else {}),
            "rows": [],
        }
        if arguments.resume and self.output is not None and self.output.exists():
            kept = json.loads(self.output.read_text())
            if differences := changed(kept, self.results):
                raise SystemExit(
                    f"{self.output} was measured with another {', '.join(differences)}; leave --resume out to measure "
                    "all of it again."
                )
            self.results = kept
        self._seconds_per_work: dict[str, float] = {}

    def measure(
        self,
        case: dict[str, Any],
        calls: Mapping[str, Callable[[], Any]],
        work: Mapping[str, float] | float = 0,
        needs: Mapping[str, float] | float = 0,
    ) -> dict[str, Any]:
        """Returns the row of a case: each call runs once to warm up, then all run in turn, `--repeats` times.

        The order changes each time, because a call finds the caches as the one before left them.

        Args:
            case: what distinguishes it from the others.
            calls: what is measured, by name.
            work: how much each does, in any unit. From its speed in the case before follows how long a call will take;
                one above the limit is left out.
            needs: bytes each takes; a call for which they are not free is left out.
        """
        works = work if isinstance(work, Mapping) else dict.fromkeys(calls, work)
        for row in self.results["rows"]:
            if row["case"] == case:
                self._learn(row, works)
                return row
        gc.collect()
        figures: dict[str, Any] = {}
        all_needs = needs if isinstance(needs, Mapping) else dict.fromkeys(calls, needs)
        device, limit = self.arguments.device, self.arguments.limit
        for name, call in calls.items():
            expected = works[name] * self._seconds_per_work.get(name, 0)
            if expected > limit:
                figures[name] = {"left_out": f"a run would take {expected:.0f} s"}
            elif all_needs[name] > free_bytes(device):
                figures[name] = {"left_out": f"needs {all_needs[name] / 1e9:.0f} GB"}
            else:
                try:
                    with PeakMemory(device) as memory:
                        _seconds(call, device)
                except RuntimeError as error:  # such as running out of memory, or no compiler for torch.compile
                    figures[name] = {"left_out": str(error).strip().splitlines()[0][:80]}
                else:
                    figures[name] = {"runs": [], "bytes": memory.bytes}
        measured = [name for name in figures if "runs" in figures[name]]
        if self.keeps_memory and measured:
            torch.ones(max(figures[name]["bytes"] or 0 for name in measured), dtype=torch.uint8)  # freed, and kept
        title = ", ".join(f"{key} {value}" for key, value in case.items())
        order = random.Random(0)
        for _ in tqdm(range(self.arguments.repeats), desc=title, unit="run", delay=1, leave=False, disable=None):
            for name in order.sample(measured, len(measured)):
                figures[name]["runs"].append(_seconds(calls[name], device))
        for name in measured:
            figures[name]["seconds"] = median(figures[name]["runs"])
        row = self.add({"case": case, "calls": figures})
        self._learn(row, works)
        return row

    def _learn(self, row: dict[str, Any], works: Mapping[str, float]) -> None:
        """Notes the best speed of every call, from which `measure` expects the time of the next case.

        The best, because other work on the machine may have held up the slower runs.
        """
        for name, call in row["calls"].items():
            if "runs" in call and works.get(name):
                self._seconds_per_work[name] = min(call["runs"]) / works[name]

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keeps and returns a row."""
        self.results["rows"].append(row)
        self.save()
        return row

    def note(self, row: dict[str, Any], **facts: Any) -> None:
        """Adds facts to a row."""
        row.update(facts)
        self.save()

    def save(self) -> None:
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.output.write_text(json.dumps(self.results, indent=1) + "\n")


def clock(device: str) -> float:
    """Returns the time in seconds, once a GPU has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _seconds(call: Callable[[], Any], device: str) -> float:
    start = clock(device)
    with torch.no_grad():
        call()
    return clock(device) - start


def describe_machine(device: str, dtype: str) -> dict[str, Any]:
    """Returns what a measurement depends on: processor, GPU, memory, versions, and how busy the machine was."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
    return {
        "device": torch.cuda.get_device_name(device) if device != "cpu" else processor,
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_before": round(os.getloadavg()[0], 1),
        "date": date.today().isoformat(),
    }


def changed(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Returns in what two results of a benchmark can't be compared: the command, or facts of the machine."""
    facts = sorted((one["machine"].keys() | other["machine"].keys()) - {"date", "load_before"})
    differences = [fact for fact in facts if one["machine"].get(fact) != other["machine"].get(fact)]
    return differences + (["command"] if one["command"] != other["command"] else [])


def ratio(row: dict[str, Any], name: str, to: str) -> float | None:
    """Returns the time of one call divided by that of another, the median over their pairs; None without figures."""
    pair = [row["calls"].get(call, {}).get("runs") for call in (name, to)]
    if not all(pair):
        return None
    return median(one / other for one, other in zip(*pair, strict=True))


def figure(row: dict[str, Any], name: str, field: str, scale: float = 1) -> str:
    """Returns a call's `"seconds"` or `"bytes"` for a table, or why it has none.

    The range stands beside it where the longest run took over 1.5 times as long as the shortest.
    """
    call = row["calls"].get(name, {})
    if "left_out" in call:
        return call["left_out"]
    text = number(None if call.get(field) is None else call[field] / scale)
    runs = [seconds / scale for seconds in call.get("runs", [])] if field == "seconds" else []
    if runs and max(runs) > 1.5 * min(runs):
        text += f" ({number(min(runs))} to {number(max(runs))})"
    return text


def number(value: float | None) -> str:
    """Returns three digits of a number for a table; nothing for None."""
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
