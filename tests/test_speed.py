"""Every benchmark runs, at tiny sizes, and its results become a page."""

import json
import threading

import numpy as np
import psutil
import pytest
import torch

from fastlongspeech.app.markdown import table
from fastlongspeech.speed import encoder, flops, frontend, fusion, prefill, recording, report, trials
from fastlongspeech.speed.common import Benchmark, PeakMemory, figure, keep_freed_memory, parse, ratio

QUICK = [fusion, encoder, prefill, frontend, recording, trials, flops]


@pytest.mark.slow
def test_every_benchmark_runs_and_the_page_holds_its_table(tmp_path, capsys):
    results = tmp_path / "results"
    tables = []
    for module in QUICK:
        output = results / f"{module.__name__.rpartition('.')[2]}.json"
        made = module.main(["--quick", "--device", "cpu", "--output", str(output)])
        assert json.loads(output.read_text()) == made
        assert "left_out" not in output.read_text()
        tables += [module.report(made), f"```bash\n{made['command']}\n```"]
        assert tables[-2] in capsys.readouterr().out

    report.main(["--results", str(results), "--docs", str(tmp_path)])
    page = (tmp_path / "performance.md").read_text()
    assert [table for table in tables if table not in page] == []
    assert "ours, L = 400" in (tmp_path / "prefill.svg").read_text()
    assert all((tmp_path / f"{name}.svg").exists() for name in ("fusion", "encoder", "frontend", "recording"))
    assert "\n\nNot measured yet: on a GPU fusion, encoder, prefill," in page


def test_goals_are_the_worst_figures():
    def row(frames: int, ours: float, two: float, encoder: float) -> dict:
        times = {"ours": ours, "loop, two matrices": two, "encoder": encoder}
        case = {"batch": 1, "frames": frames, "windows encoded": 2}
        return {"case": case, "calls": {name: {"runs": [time]} for name, time in times.items()}}

    results = {"command": "--device cpu", "rows": [row(750, 0.1, 0.4, 10.0), row(7500, 2.0, 7.0, 10.0)]}
    assert fusion.goals(results) == [
        # 2 s to the 50 s of ten windows
        ("density and fusion / encoder", "at most 4%", "4.0% at most (7,500 frames, batch 1)", True),
        ("loop, two matrices / ours", "at least 3", "3.50 at least (7,500 frames, batch 1)", True),
    ]
    results["rows"].append(row(100, 0.2, 0.4, 10.0))
    assert [goal.met for goal in fusion.goals(results)] == [False, False]


def test_growth_is_that_of_the_long_recordings():
    rows = [
        {"case": {"batch": 1, "seconds": seconds}, "calls": {"ours, L = 400": {"seconds": time, "runs": [time]}}}
        for seconds, time in ((10, 5.0), (600, 2.0), (2400, 8.0))
    ]
    assert prefill.goals({"rows": rows}) == [
        ("ours, L = 400, 600 s to 2400 s", "time grows no faster than duration^1, to 0.1", "duration^1.00", True)
    ]


def test_durations_and_dtype_can_be_chosen(tmp_path):
    words = ["--quick", "--device", "cpu", "--output", str(tmp_path / "a.json")]
    made = prefill.main([*words, "--dtype", "bfloat16", "--seconds", "10", "60"])
    assert [row["case"] for row in made["rows"]] == [{"batch": 1, "seconds": 10}, {"batch": 1, "seconds": 60}]
    assert made["machine"]["dtype"] == "bfloat16"
    assert "--model tiny --dtype bfloat16 --seconds 10 60 --repeats 1" in made["command"]


def test_a_page_of_nothing_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no results"):
        report.main(["--results", str(tmp_path), "--docs", str(tmp_path)])


@pytest.fixture
def benchmark(tmp_path) -> Benchmark:
    arguments = parse("", ["--device", "cpu", "--repeats", "3", "--limit", "1", "--output", str(tmp_path / "a.json")])
    return Benchmark("a", arguments)


def test_calls_run_in_turn_after_one_to_warm_up(benchmark):
    order = []
    row = benchmark.measure({"size": 1}, {"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    assert order[:2] == ["a", "b"]
    assert all(sorted(order[turn : turn + 2]) == ["a", "b"] for turn in (2, 4, 6)) and len(order) == 8
    assert len(row["calls"]["a"]["runs"]) == 3


def test_a_ratio_is_the_median_of_pairs():
    row = {
        "calls": {"a": {"runs": [1.0, 9.0, 4.0]}, "b": {"runs": [1.0, 3.0, 2.0]}, "c": {"left_out": "out of memory"}}
    }
    assert ratio(row, "a", "b") == 2.0
    assert ratio(row, "a", "c") is None


def test_what_would_take_too_long_or_too_much_is_left_out_and_named(benchmark):
    pause = threading.Event()
    calls = {"slow": lambda: pause.wait(0.1), "quick": lambda: None}
    benchmark.measure({"size": 1}, calls, work=1.0)
    row = benchmark.measure({"size": 100}, calls, work=100.0)
    assert row["calls"]["slow"]["left_out"].startswith("a run would take")
    assert "runs" in row["calls"]["quick"]
    row = benchmark.measure({"size": 2}, calls, needs=1e18)
    assert row["calls"]["quick"] == {"left_out": "needs 1000000000 GB"}


def test_runs_that_were_held_up_leave_no_case_out(benchmark):
    pauses = iter([0.0, 0.2, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0])
    calls = {"quick": lambda: threading.Event().wait(next(pauses))}
    benchmark.measure({"size": 1}, calls, work=1.0)
    assert "runs" in benchmark.measure({"size": 10}, calls, work=10.0)["calls"]["quick"]


def test_runs_that_differ_by_half_show_their_range():
    calls = {"even": {"runs": [2.0, 2.5], "seconds": 2.25}, "uneven": {"runs": [2.0, 10.0], "seconds": 6.0}}
    assert figure({"calls": calls}, "even", "seconds") == "2.25"
    assert figure({"calls": calls}, "uneven", "seconds") == "6 (2 to 10)"


def test_resume_keeps_the_cases_that_are_there_and_knows_how_long_they_took(benchmark):
    pause = threading.Event()
    first = benchmark.measure({"size": 1}, {"slow": lambda: pause.wait(0.1)}, work=1.0)
    words = ["--device", "cpu", "--repeats", "3", "--output", str(benchmark.output), "--resume"]
    resumed = Benchmark("a", parse("", [*words, "--limit", "1"]))
    assert resumed.measure({"size": 1}, {"slow": lambda: pytest.fail("measured again")}, work=1.0) == first
    row = resumed.measure({"size": 100}, {"slow": lambda: pytest.fail("too long")}, work=100.0)
    assert row["calls"]["slow"]["left_out"].startswith("a run would take")
    with pytest.raises(SystemExit, match="was measured with another command; leave --resume out"):
        Benchmark("a", parse("", [*words, "--limit", "2"]))


def test_peak_memory_is_what_was_taken_inside():
    kept = np.ones(30_000_000 // 8)
    with PeakMemory("cpu") as memory:
        np.ones(80_000_000 // 8).sum()
    if memory.bytes is None:
        pytest.skip("only Linux tells the peak")
    assert 75e6 < memory.bytes < 110e6
    assert len(kept)


def test_freed_memory_is_kept_or_given_back():
    def held_after_freeing() -> int:
        np.ones(80_000_000 // 8).sum()
        return psutil.Process().memory_info().rss

    if not keep_freed_memory():
        pytest.skip("only glibc can be told")
    try:
        kept = held_after_freeing()
        with PeakMemory("cpu"):  # gives back what is kept
            given_back = psutil.Process().memory_info().rss
        keep_freed_memory(False)
        assert kept - given_back > 70e6
        assert held_after_freeing() - given_back < 10e6
    finally:
        keep_freed_memory(False)


def test_a_table_is_markdown():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


def test_convolutions_with_channels_last_are_the_same():
    first, last = torch.nn.Conv1d(8, 16, 3, padding=1), torch.nn.Conv1d(16, 16, 3, stride=2, padding=1)
    features = torch.randn(2, 8, 50)
    expected = torch.nn.functional.gelu(last(torch.nn.functional.gelu(first(features))))
    torch.testing.assert_close(trials.channels_last(features, first, last), expected)


def test_the_loop_is_the_paper_s():
    """One round by hand: of four frames the first two are alike and become their weighted mean."""
    frames = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    densities = torch.tensor([0.25, 0.75, 0.5, 0.5])
    fused, starts = fusion.loop([frames], 3, lambda hidden: densities[: len(hidden)])[0]
    torch.testing.assert_close(fused, torch.tensor([[2.5, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    assert starts.tolist() == [0, 2, 3]
