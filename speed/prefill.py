"""Time to the first token of the answer, and memory, from a recording's mel features on the device.

    python -m fastlongspeech.speed.prefill --device cuda

Our method at several L and average pooling are compared with reading every frame, as NTK-RoPE does. NTK-RoPE changes
the base of the rotary positions. That takes no time, so all methods run on the same weights. Every method computes
logits at the last position alone. The exception is the stock model of transformers, which reads at most 30 s. A batch
holds recordings of the same duration.

Beside the times stand the counted operations (see `app/cost.py`). Their ratio is the ratio of times only where the
encoder does as many operations a second as the language model. So a table says how many each does. On a CPU it also
says what a profile (torch.profiler) finds: how much of the time goes into matrix products, and how much into
attention, whose softmax is not counted.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2AudioForConditionalGeneration

from fastlongspeech.app.cost import TEXT_TOKENS, ModelCost
from fastlongspeech.app.markdown import table

from .common import (
    FRAMES_PER_SECOND,
    Benchmark,
    Goal,
    benchmark_model,
    clock,
    figure,
    growth,
    number,
    parse,
    ratio,
    windows_of,
)

SECONDS = (10, 30, 60, 133, 300, 600, 1200, 1800, 3600, 7200)
BATCHES = (2, 4, 8, 16, 32)  # at 30 s
OPERATORS = {
    "matrix products": ("aten::addmm", "aten::mm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
}
EVERY_FRAME, STOCK = "every frame (NTK-RoPE)", "stock"
METHODS: dict[str, dict[str, Any]] = {
    "ours, L = 750": {"target_length": 750},
    "ours, L = 400": {"target_length": 400},
    "ours, L = 100": {"target_length": 100},
    "average pooling, L = 400": {"target_length": 400, "compression": "average_pooling"},
    EVERY_FRAME: {"compression": "none"},
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse(__doc__ or "", argv, models=("tenth", "7b"), seconds=SECONDS)
    device, quick = arguments.device, arguments.quick
    model = benchmark_model(arguments.model, device, arguments.dtype)
    cost = ModelCost(model.config)
    stock = stock_model(model)
    benchmark = Benchmark("prefill", arguments)
    cases = [(1, seconds) for seconds in arguments.seconds or ((40,) if quick else SECONDS)]
    if not arguments.seconds:
        cases += [(batch, 30) for batch in ((2,) if quick else BATCHES)]
    for batch, seconds in cases:
        counted = {name: cost.recording(seconds, **options) for name, options in METHODS.items()}
        audio = windows_of(seconds, model.config.audio_config.num_mel_bins, device, model.dtype, batch)
        calls: dict[str, Callable[[], Any]] = {}
        for name, options in METHODS.items():
            inputs = audio | prompts(model.config, batch, counted[name].tokens, device)
            calls[name] = partial(model.generate, **inputs, **options, max_new_tokens=1, do_sample=False)
        if seconds <= 30:
            inputs = audio | prompts(model.config, batch, seconds * FRAMES_PER_SECOND, device)
            del inputs["windows_per_audio"]
            calls[STOCK] = partial(stock.generate, **inputs, max_new_tokens=1, do_sample=False)
        work = {name: float(batch * costs.total) for name, costs in counted.items()}
        needs = {name: batch * cache_bytes(model, costs.tokens) for name, costs in counted.items()}
        # The stock model has logits at every position, in its own dtype and in float32.
        logits = batch * (counted[EVERY_FRAME].tokens + TEXT_TOKENS) * model.config.get_text_config().vocab_size * 8.0
        work[STOCK], needs[STOCK] = work[EVERY_FRAME], needs[EVERY_FRAME] + logits
        row = benchmark.measure({"batch": batch, "seconds": seconds}, calls, work, needs)
        benchmark.note(row, tflops={name: batch * costs.total / 1e12 for name, costs in counted.items()})
        if "seconds" in row["calls"][EVERY_FRAME] and "seconds_of_parts" not in row:
            flops = counted[EVERY_FRAME].flops
            seconds_of_parts, shares = profile_parts(model, calls[EVERY_FRAME], device)
            tflops = {part: batch * flops[part] / 1e12 for part in seconds_of_parts}
            benchmark.note(row, seconds_of_parts=seconds_of_parts, tflops_of_parts=tflops, shares_of_parts=shares)
    print(report(benchmark.results))
    return benchmark.results


def profile_parts(
    model: Any, call: Callable[[], Any], device: str
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Returns how long the parts of the model took in one call, named as in `Cost.flops`, and on a CPU the shares of
    that time that went into each of `OPERATORS`."""
    seconds = dict.fromkeys(("encoder", "prefill"), 0.0)
    operators: dict[str, Counter[str]] = {part: Counter() for part in seconds}
    profiler = profile(activities=[ProfilerActivity.CPU])
    hooks = []

    def begins(part: str, *_: Any) -> None:
        nonlocal profiler
        profiler = profile(activities=[ProfilerActivity.CPU])
        if device == "cpu":
            profiler.start()
        seconds[part] -= clock(device)

    def ends(part: str, *_: Any) -> None:
        seconds[part] += clock(device)
        if device == "cpu":
            profiler.stop()
            operators[part].update({event.key: event.self_cpu_time_total for event in profiler.key_averages()})

    for part, module in (("encoder", model.model.audio_tower), ("prefill", model.model.language_model)):
        hooks.append(module.register_forward_pre_hook(partial(begins, part)))
        hooks.append(module.register_forward_hook(partial(ends, part)))
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    shares = {
        part: {name: sum(found[key] for key in keys) / found.total() for name, keys in OPERATORS.items()}
        for part, found in operators.items()
        if found
    }
    return seconds, shares


def stock_model(model: Any) -> Any:
    """Returns transformers' Qwen2-Audio on the weights of ours."""
    with torch.device("meta"):
        stock = Qwen2AudioForConditionalGeneration._from_config(model.config, dtype=model.dtype).eval()
    stock.load_state_dict(model.state_dict(), strict=False, assign=True)
    stock.model.language_model.rotary_emb = model.model.language_model.rotary_emb
    stock.generation_config = model.generation_config
    return stock


def prompts(config: Any, batch: int, tokens: int, device: str) -> dict[str, torch.Tensor]:
    """Returns prompts of a recording's placeholders between words."""
    words = torch.randint(0, 99, (TEXT_TOKENS,), generator=torch.Generator().manual_seed(0))
    words += words >= config.audio_token_index  # any token but the placeholder
    placeholders = torch.full((tokens,), config.audio_token_index)
    ids = torch.cat((words[:15], placeholders, words[15:])).expand(batch, -1).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def cache_bytes(model: Any, tokens: int) -> float:
    """Returns the bytes of the keys and values of a prompt."""
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2.0 * text.num_hidden_layers * text.num_key_value_heads * head * tokens * model.dtype.itemsize


def goals(results: dict[str, Any]) -> list[Goal]:
    """Returns what was to be reached. The ratios of 133 s are goals for 7B on a GPU; elsewhere they stand beside."""
    goals = []
    times = {}
    for row in results["rows"]:
        for name in ("ours, L = 750", "ours, L = 400"):
            measured = ratio(row, name, EVERY_FRAME)
            if row["case"] == {"batch": 1, "seconds": 133} and measured is not None:
                counted = row["tflops"][name] / row["tflops"][EVERY_FRAME]
                met = abs(measured / counted - 1) <= 0.15
                wanted = f"{counted:.2f}, as counted, to 15 %"
                goals.append(Goal(f"{name} / every frame, 133 s", wanted, f"{measured:.2f}", met))
        call = row["calls"]["ours, L = 400"]
        if row["case"]["batch"] == 1 and "seconds" in call:
            times[row["case"]["seconds"]] = call["seconds"]
    return goals + growth("ours, L = 400", times)


def report(results: dict[str, Any]) -> str:
    """Returns the tables of results: ratios, seconds and memory."""
    names = [*METHODS, STOCK]
    others = [name for name in names if name != EVERY_FRAME]
    ratios, seconds, memory, speeds = [], [], [], []
    for row in results["rows"]:
        case = [f"{row['case']['seconds']:,}", str(row["case"]["batch"])]
        counted = {name: flops / row["tflops"][EVERY_FRAME] for name, flops in row["tflops"].items()}
        pairs = [(number(ratio(row, name, EVERY_FRAME)), number(counted.get(name))) for name in others]
        ratios.append(case + [f"{measured} ({count})" if count else measured for measured, count in pairs])
        seconds.append(case + [figure(row, name, "seconds") for name in names])
        memory.append(case + [figure(row, name, "bytes", 1e6) for name in names])
        if parts := row.get("seconds_of_parts"):
            speeds.append(case + [number(row["tflops_of_parts"][part] * 1e3 / parts[part]) for part in parts])
            for part in parts:
                shares = row.get("shares_of_parts", {}).get(part, {})
                speeds[-1] += [f"{shares[name]:.0%}" if name in shares else "" for name in OPERATORS]
    first = ["recording, s", "batch"]
    parts = ["encoder", "language model"]
    of_parts = ["Speed of each part when every frame is read, in GFLOP/s, and the shares of its time:"]
    of_parts += [table(first + parts + [f"{part}, in {name}" for part in parts for name in OPERATORS], speeds)]
    return "\n\n".join(
        [
            "Seconds divided by those of every frame; in brackets, the same ratio of counted operations:",
            table(first + others, ratios),
            *(of_parts if speeds else []),
            "Seconds to the first token:",
            table(first + names, seconds),
            "Peak memory beyond weights and mel features, MB:",
            table(first + names, memory),
        ]
    )


if __name__ == "__main__":
    main()
