"""The encoder, compared with the stock one of transformers, which reads 30 s for every clip, however short.

    python -m fastlongspeech.speed.encoder --device cpu

Both have the same random weights and read the same windows. A test compares the frames they give.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from fastlongspeech.app.markdown import table
from fastlongspeech.modeling_fastlongspeech import FastLongSpeechEncoder

from .common import Benchmark, figure, load_config, number, parse, ratio, windows_of

SECONDS = (1, 2, 5, 10, 20, 30)
BATCHES = (1, 2, 4, 8, 16, 32)
OURS, STOCK = "ours", "stock"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse(__doc__ or "", argv, models=("7b", "7b"))
    device, dtype, quick = arguments.device, arguments.dtype, arguments.quick
    config = load_config(arguments.model).audio_config
    torch.manual_seed(0)
    with torch.device(device):
        ours = FastLongSpeechEncoder._from_config(config, dtype=dtype).eval()
    with torch.device("meta"):
        stock = Qwen2AudioEncoder._from_config(config, dtype=dtype).eval()
    stock.load_state_dict(ours.state_dict(), assign=True)

    benchmark = Benchmark("encoder", arguments)
    for batch in (2,) if quick else BATCHES:
        for seconds in (1, 30) if quick else SECONDS:
            inputs = windows_of(seconds, ours.config.num_mel_bins, device, dtype, batch)
            features, mel_frames = inputs["input_features"], inputs["feature_attention_mask"].sum(1).cpu()
            positions = torch.arange(1500, device=device)
            mask = create_bidirectional_mask(
                config=stock.config,
                inputs_embeds=features.new_empty(batch, 1500, 1),
                attention_mask=(positions < mel_frames[:, None].to(device) // 2).long(),
            )
            calls = {
                OURS: partial(ours, features, mel_frames),
                STOCK: partial(stock, features, attention_mask=mask),
            }
            work = {OURS: float(batch * seconds), STOCK: float(batch * 30)}
            benchmark.measure({"batch": batch, "seconds": seconds}, calls, work)
    print(report(benchmark.results))
    return benchmark.results


def report(results: dict[str, Any]) -> str:
    """Returns the table of results."""
    headings = ["clip, s", "batch", "ours / stock", "ours, s", "stock, s", "ours, MB", "stock, MB"]
    rows = [
        [
            str(row["case"]["seconds"]),
            str(row["case"]["batch"]),
            number(ratio(row, OURS, STOCK)),
            *(figure(row, name, "seconds") for name in (OURS, STOCK)),
            *(figure(row, name, "bytes", 1e6) for name in (OURS, STOCK)),
        ]
        for row in results["rows"]
    ]
    return table(headings, rows)


if __name__ == "__main__":
    main()
