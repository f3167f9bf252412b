"""The benchmark of `combine` at small sizes: complete rows, and the page has the saved result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftModel

from benchmarks.combine import answers, suite


def test_every_case_is_measured_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "QUICK", suite.Sizes(width=24, rank=3, repeats=1))
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)  # takes most of the time
    assert suite.main(["--quick", "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    rows = result["rows"]
    assert [(row["case"], row["method"]) for row in rows] == [(c, m) for c in suite.CASES for m in suite.METHODS]
    errors = {(row["case"], row["method"]): row["error"] for row in rows}
    assert errors["sum of rsLoRAs", suite.OURS] < 1e-6 < 0.5 < errors["sum of rsLoRAs", suite.PEER]
    assert [row["request"] for row in result["answers"]] == list(answers.REQUESTS)
    assert [row["combine"] for row in result["answers"]] == [
        "exact",  # rsLoRA
        *["ValueError"] * 3,  # DoRA, biases, too few weights
        "rank 2",
        *["combined"] * 2,  # ranks that differ, patterns
        "exact",
        "ValueError",  # a name that exists
        "rank 2",
    ]


def test_the_page_has_the_saved_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "combine.md"
    page.write_text(suite.PAGE.read_text())
    monkeypatch.setattr(suite, "PAGE", page)
    assert suite.main(["--markdown"]) == 0
    assert page.read_text() == (suite.common.ROOT / "docs" / "combine.md").read_text()


def test_an_error_above_that_of_the_definition_is_no_result() -> None:
    row = {"case": "sum", "method": suite.OURS, "error": 0.52, "optimum": 0.5}
    (said,) = suite.wrong_rows([row, {**row, "method": suite.PEER}, {**row, "error": 0.5001}])
    assert "0.52" in said
