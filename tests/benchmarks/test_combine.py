"""The benchmark of `combine` at small sizes: complete rows, and the page has the saved result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import combine


def test_every_case_is_measured_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combine, "QUICK", combine.Sizes(width=24, rank=3, repeats=1))
    assert combine.main(["--quick", "--json", str(tmp_path / "result.json")]) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [(row["case"], row["method"]) for row in rows] == [(c, m) for c in combine.CASES for m in combine.METHODS]
    errors = {(row["case"], row["method"]): row["error"] for row in rows}
    assert errors["sum of rsLoRAs", combine.OURS] < 1e-6 < 0.5 < errors["sum of rsLoRAs", combine.PEER]


def test_the_page_has_the_saved_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "combine.md"
    page.write_text(combine.PAGE.read_text())
    monkeypatch.setattr(combine, "PAGE", page)
    assert combine.main(["--markdown"]) == 0
    assert page.read_text() == (combine.common.ROOT / "docs" / "combine.md").read_text()


def test_an_error_above_that_of_the_definition_is_no_result() -> None:
    row = {"case": "sum", "method": combine.OURS, "error": 0.52, "optimum": 0.5}
    (said,) = combine.wrong_rows([row, {**row, "method": combine.PEER}, {**row, "error": 0.5001}])
    assert "0.52" in said
