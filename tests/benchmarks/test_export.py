"""The benchmark of `export_lora` at small sizes: complete rows, and no result for an error that is not the optimum."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.export import model, suite


def test_every_update_is_measured_with_both_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "QUICK", suite.Sizes(width=24, rank=4, repeats=1))
    assert suite.main(["--quick", "--json", str(tmp_path / "result.json")]) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [(row["update"], row["method"]) for row in rows] == [
        (update, method) for update in suite.CASES for method in suite.METHODS
    ]
    for row in rows:
        assert row["error"] == pytest.approx(row["optimum"], abs=1e-5) and row["seconds"] > 0


def test_the_page_has_the_saved_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "export.md"
    page.write_text(suite.PAGE.read_text())
    monkeypatch.setattr(suite, "PAGE", page)
    assert suite.main(["--markdown"]) == 0
    assert page.read_text() == (suite.common.ROOT / "docs" / "export.md").read_text()


def test_an_error_above_the_optimum_is_no_result(tmp_path: Path) -> None:
    row = {"update": "SNELL", "method": suite.OURS, "error": 0.52, "optimum": 0.5}
    (said,) = suite.wrong_rows([row, {**row, "method": suite.PEER}, {**row, "error": 0.5001}])
    assert "0.52" in said


def test_the_task_is_that_of_the_demo() -> None:
    task = model.demo_task("somewhere")
    assert (task.settings.method, task.settings.model, task.settings.output) == ("snell", "smollm2-135m", "somewhere")
    rows = [
        {"model": "base", "perplexity": 20.0},
        {"model": "LoRA", "error": 0.5, "seconds": 2, "bytes": 1e6, "perplexity": 9},
    ]
    assert "20.000" in model.table(rows) and "0.500" in model.table(rows)
