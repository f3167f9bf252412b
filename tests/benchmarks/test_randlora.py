"""The benchmark of RandLoRA at toy sizes: it runs, its rows are complete, and nothing wrong gets a number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.randlora import suite as randlora

QUICK = ["--quick", "--repeats", "1"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("results") / "randlora.json"
    assert randlora.main([*QUICK, "--json", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_method_has_a_row_in_every_case(result: Any) -> None:
    assert len(result["cases"]) == 2
    for case in result["cases"]:
        assert [row["method"] for row in case["rows"]] == list(randlora.QUICK.methods())
        for row in case["rows"]:
            assert row["seconds"] > 0 and len(row["seconds_all"]) == 1
            assert row["peak_bytes"] > row["saved_bytes"] > 0


def test_ours_has_the_parameters_of_peft_s_and_a_smaller_file(result: Any) -> None:
    for case in result["cases"]:
        rows = {row["method"]: row for row in case["rows"]}
        for name in randlora.OURS:
            assert rows[name]["parameters"] == rows[randlora.PEER]["parameters"]
            assert rows[name]["saved_bytes"] <= rows[randlora.LORA]["saved_bytes"] < rows[randlora.PEER]["saved_bytes"]
            assert rows[name]["file_bytes"] < rows[randlora.PEER]["file_bytes"] / 2


def test_results_become_a_page(result: Any) -> None:
    page = randlora.REPORT.markdown([result])
    assert page.count("| RandLoRA, ternary |") == 2 and result["machine"]["torch"] in page
    assert "python -m benchmarks.randlora" in randlora.REPORT.markdown([])


def test_a_wrong_result_gets_no_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = randlora.definition
    monkeypatch.setattr(randlora, "definition", lambda layer, lambda_, gamma: right(layer, lambda_, 1.1 * gamma))
    assert randlora.main([*QUICK, "--json", str(tmp_path / "randlora.json")]) == 1
    printed = capsys.readouterr().out
    assert not (tmp_path / "randlora.json").exists()
    assert "RandLoRA, ternary: relative error" in printed


def test_the_docs_show_the_saved_results() -> None:
    page = randlora.REPORT.page.read_text(encoding="utf-8")
    shown = randlora.common.replace_block(page, "results", randlora.REPORT.markdown(randlora.REPORT.saved()))
    assert shown == page, "run `python -m benchmarks.randlora --markdown`"
