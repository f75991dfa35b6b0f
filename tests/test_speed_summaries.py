"""The table of what summaries save: counted at the sizes of 7B, measured on a model that runs."""

from pathlib import Path
from typing import Any

from fastlongspeech import FastLongSpeechForConditionalGeneration
from fastlongspeech.app.cost import ModelCost
from fastlongspeech.speed import summaries


def test_the_tables_are_counted_and_measured(checkpoint: Path, tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n")
    summaries.main(
        ["--model", str(checkpoint), "--seconds", "60", "--output", str(tmp_path / "rows.jsonl"), "--docs", str(page)]
    )
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
    size, most, operations = summaries.measure(model.model, 200, 750, 1)
    assert size == most == 2 * counter.recording(8.0, compression="none").cache_bytes
    # Shorter than an interval: one piece, with text before and after it.
    text = (counter.language_model(20), counter.language_model(20, 220))
    assert operations == sum(text) + counter.language_model(200, 20)


def test_every_frame_of_a_long_recording_is_read_by_intervals(checkpoint: Path) -> None:
    model = FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint).eval()
    counter: Any = ModelCost(model.config)
    operations = summaries.measure(model.model, 1500, 750, 1)[2]
    assert summaries.pieces(1500) == [20, 720, 720, 60, 20]
    assert operations + counter.logits(1) == summaries.every_frame(counter, 1500)
    assert operations < counter.language_model(1540)  # which pays for attention that is masked, too
