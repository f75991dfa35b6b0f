"""Ours may skip what the stock class skips, what `AGAINST_THE_WINDOW_LAYOUT` names, and what `NOT_ASKED` names."""

import pytest

OURS, STOCK = "FastLongSpeech", "Stock"  # what the names of the two classes in each suite start with

AGAINST_THE_WINDOW_LAYOUT = dict.fromkeys(
    [
        "test_get_audio_features_output_0",
        "test_get_audio_features_output_2",
        "test_get_audio_features_hidden_states",
        "test_get_audio_features_attentions",
    ],
    "get_audio_features joins the windows of a recording and fuses their frames: there is no output of the encoder, "
    "of one of its layers or attentions, with a row per window",
)

# Single tests of a single class, stock or ours.
NOT_ASKED = {
    "StockGraniteSpeechModelTest::test_inputs_embeds": "the stock class takes no features beside embeddings",
    "StockGraniteSpeechModelTest::test_causal_lm_loss_honors_shift_labels": "the stock class shifts labels by hand",
    "FastLongSpeechQwen3OmniModelTest::test_moe_models_record_router_logits": (
        "ours returns no router logits, as no stage of ours has a loss that balances experts"
    ),
}

outcomes: dict[str, dict[str, set[str]]] = {OURS: {}, STOCK: {}}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = item.nodeid.partition("::")[2]
        reason = NOT_ASKED.get(name)
        if name.startswith(OURS):
            reason = reason or AGAINST_THE_WINDOW_LAYOUT.get(item.name)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _, test_class, name = report.nodeid.split("::")
    for side, tests in outcomes.items():
        if test_class.startswith(side):
            tests.setdefault(test_class.removeprefix(side) + "::" + name, set()).add(report.outcome)


def unjustified_skips() -> list[str]:
    """Returns the tests that ran on the stock class but were skipped on ours without a reason of their own."""
    return [
        test
        for test, outcome in outcomes[OURS].items()
        if "skipped" in outcome
        and "skipped" not in outcomes[STOCK].get(test, {"skipped"})
        and test.partition("::")[2] not in AGAINST_THE_WINDOW_LAYOUT
        and OURS + test not in NOT_ASKED
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if unjustified_skips():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for test in unjustified_skips():
        terminalreporter.write_line(f"FAILED {OURS}{test} is skipped, though the stock class runs it", red=True)
