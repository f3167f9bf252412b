"""The benchmark of RandLoRA: saved results are complete, the page shows them, and wrong results are not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.randlora import study, suite

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=range(len(suite.REPORT.saved())))
def result(request: pytest.FixtureRequest) -> Any:
    return suite.REPORT.saved()[request.param]


def test_saved_results_have_every_method_in_every_case(result: Any) -> None:
    assert [case["name"] for case in result["cases"]] == [case.name for case in suite.Sizes().cases()]
    for case in result["cases"]:
        assert [row["method"] for row in case["rows"]] == list(suite.Sizes().methods())
        rows = {row["method"]: row for row in case["rows"]}
        for row in rows.values():
            assert row["seconds"] > 0 and row["peak_bytes"] > row["saved_bytes"] > 0
        for name in suite.OURS:
            assert rows[name]["parameters"] == rows[suite.PEER]["parameters"]
            assert rows[name]["saved_bytes"] <= rows[suite.LORA]["saved_bytes"] < rows[suite.PEER]["saved_bytes"]
            assert rows[name]["file_bytes"] < rows[suite.PEER]["file_bytes"] / 2


def test_the_page_shows_the_saved_results() -> None:
    page = suite.REPORT.page.read_text(encoding="utf-8")
    shown = suite.common.replace_block(page, "results", suite.REPORT.markdown(suite.REPORT.saved()))
    assert shown == page, "run `python -m benchmarks.randlora --markdown`"
    assert "python -m benchmarks.randlora" in suite.REPORT.markdown([])


def test_rows_of_a_tiny_case_are_complete() -> None:
    sizes = suite.Sizes(width=16, tokens=(4,), r=4, stack=8, stack_tokens=4, layers=1)
    rows = suite.measure(sizes, 1, sizes.cases()[0], CPU)
    assert [row["method"] for row in rows] == list(sizes.methods()) and not any("wrong" in row for row in rows)
    assert all(len(suite.cells(row)) == len(suite.HEADER) for row in rows)


def test_a_wrong_layer_is_reported_and_has_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    right = suite.definition
    monkeypatch.setattr(suite, "definition", lambda layer, lambda_, gamma: right(layer, lambda_, 1.1 * gamma))
    message = suite.check({}, 4, (16, 12), 5, CPU)
    assert message is not None and "relative error" in message
    assert suite.cells({"method": "RandLoRA", "parameters": 7, "wrong": message})[2:] == ("wrong", *["-"] * 5)


@pytest.mark.parametrize("module", [suite, study])
def test_help(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0 and "usage:" in capsys.readouterr().out
