"""Ways to draw the length L in stage 2, and the runs that compare them."""

from collections import Counter
from pathlib import Path

import pytest
from conftest import write_rows

from fastlongspeech.train import compare_lengths, dct

LENGTHS = [12, 750, 200]


def draws(way: str, steps: int = 3000) -> Counter:
    """Returns how often each length is drawn for one row, in so many steps."""
    collator = compare_lengths.WAYS[way](None, LENGTHS, seed=0)
    drawn = [collator.draw_length([{"step": step, "audio": "a.wav", "question": "Who?"}]) for step in range(steps)]
    return Counter(length if isinstance(length, int) else length[0] for length in drawn)


@pytest.mark.parametrize(
    "way, shares",
    [
        ("uniform", (1 / 3, 1 / 3, 1 / 3)),
        ("per recording", (1 / 3, 1 / 3, 1 / 3)),
        ("more long", (3 / 6, 2 / 6, 1 / 6)),
        ("more short", (1 / 6, 2 / 6, 3 / 6)),
    ],
)
def test_lengths_are_drawn_with_these_shares(way: str, shares: tuple[float, ...]) -> None:
    drawn = draws(way)
    assert [drawn[length] / 3000 for length in (750, 200, 12)] == pytest.approx(shares, abs=0.03)


def test_mild_first_begins_with_the_greatest_length_and_has_all_from_the_middle_on(monkeypatch) -> None:
    monkeypatch.setattr(compare_lengths.MildFirst, "steps", 3000)
    collator = compare_lengths.MildFirst(None, LENGTHS, seed=0)
    seen = [collator.draw_length([{"step": step}]) for step in range(3000)]
    assert set(seen[:500]) == {750} and set(seen[500:1000]) == {750, 200} and set(seen[1000:]) == set(LENGTHS)


def test_recordings_of_a_step_draw_lengths_of_their_own() -> None:
    collator = compare_lengths.PerRecording(None, LENGTHS, seed=0)
    rows = [{"step": 7, "audio": f"{number}.wav", "question": "Who?"} for number in range(40)]
    drawn = collator.draw_length(rows)
    assert set(drawn) == set(LENGTHS) and drawn == collator.draw_length(rows)


def test_every_way_starts_from_the_same_model_and_is_scored_on_the_same_questions(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    asked = [("question", "a.wav"), ("transcribe", "b.wav"), ("question", "c.wav"), (None, "d.wav")]
    rows = [{"audio": audio, "question": "Who?", "answer": "I.", "task": task} for task, audio in asked]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    trained, scored = [], []
    monkeypatch.setattr(dct, "main", lambda options, collator: trained.append((options, collator)))

    def measure(_, folder: Path, manifest: Path, lengths: list[int]) -> list[tuple[int, float]]:
        scored.append(manifest.read_text())
        return [(length, 1.5) for length in lengths]

    monkeypatch.setattr(compare_lengths, "measure", measure)
    command = ["model", str(tmp_path / "out"), "--train-data", str(data), "--held-out", str(data), "750", "12"]
    compare_lengths.main([*command, "--questions", "2", "--steps", "7"])
    assert [collator for _, collator in trained] == list(compare_lengths.WAYS.values())
    assert all({"--model=model", "--max_steps=7"} <= set(options) for options, _ in trained)
    questions = (tmp_path / "out" / "train.jsonl").read_text()
    assert [str(tmp_path / audio) in questions for _, audio in asked] == [True, False, True, True]
    assert len(scored) == 5 and len(set(scored)) == 1 and len(scored[0].splitlines()) == 2
    assert "| mild first | 1.500 | 1.500 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds results with steps '7', not '8'; name another"):
        compare_lengths.main([*command, "--questions", "2", "--steps", "8"])


@pytest.mark.parametrize(
    "held_out, message",
    [
        ([], "at least one length"),
        (["12", "x"], "whole numbers of frames"),
        (["12"], "not 96"),
        (["12", "--questions", "1", "2"], "one for each of 1"),
    ],
)
def test_bad_held_out_data_is_refused(tmp_path: Path, capsys, held_out: list[str], message: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"audio": "a.wav", "question": "Who?", "answer": "I."}])
    command = ["model", str(tmp_path), "--train-data", str(data), "--held-out", str(data), *held_out]
    with pytest.raises((SystemExit, ValueError)) as error:
        compare_lengths.main(command)
    assert message in capsys.readouterr().err + str(error.value)
