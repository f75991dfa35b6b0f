"""The table of what summaries save: counted at the sizes of 7B, measured on a model that runs."""

from pathlib import Path
from typing import Any

from transformers import DynamicCache

from fastlongspeech import FastLongSpeechForConditionalGeneration
from fastlongspeech.app.cost import ModelCost
from fastlongspeech.speed import summaries


def test_the_tables_are_counted_and_measured(checkpoint: Path, tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n")
    summaries.main(["--model", str(checkpoint), "--seconds", "60", "--docs", str(page)])
    text = page.read_text()
    hour = next(line for line in text.splitlines() if line.startswith("| 1 h |"))
    assert hour.split(" | ")[1:4] == ["44", "5.51", "2.77"]  # (90,000 + 40), (11,250 + 40) and (5,625 + 40) x 512 KiB
    whole, summed = (
        next(line for line in text.splitlines() if f"| 1 min | {name}" in line) for name in ("every", "summaries, 8")
    )
    assert whole.split(" | ")[3] == "100%" and summed.split(" | ")[3] == f"{(188 + 40) / 1540:.0%}"


def test_what_is_measured_is_what_is_counted(checkpoint: Path) -> None:
    model = FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint, summary_interval=48).eval()
    counter: Any = ModelCost(model.config)
    for length, ratio in ((750, 4), (375, 8)):
        cost = counter.recording(8.0, length, "summary", compression_ratio=ratio)
        size, most, operations = summaries.measure(model.model, 200, length, ratio)
        assert size == 2 * cost.cache_bytes  # in float32
        assert size < most < size + 2 * counter.sizes.language_model().cache_bytes(2 * 48)
        assert operations + counter.logits(1) == cost.flops["prefill"]
    cache = DynamicCache(config=model.config.get_text_config())
    assert summaries.measure(model.model, 200, 750, 1)[0] == 2 * counter.recording(8.0, compression="none").cache_bytes
    assert cache.get_seq_length() == 0
