"""The benchmark of SNELL at toy sizes: it runs, its rows are complete, and nothing wrong gets a number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import snell

QUICK = ["--quick", "--repeats", "1"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("results") / "snell.json"
    assert snell.main([*QUICK, "--json", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_method_has_a_row_in_every_case(result: Any) -> None:
    names = [snell.BASELINE, *snell.VARIANTS, snell.DENSE]
    assert len(result["cases"]) == 2
    for case in result["cases"]:
        assert [row["method"] for row in case["rows"]] == names
        for row in case["rows"]:
            assert row["seconds"] > 0 and len(row["seconds_all"]) == 1
            assert row["peak_bytes"] > row["saved_bytes"] > 0


def test_parameters_are_equal_but_for_those_of_the_kernel(result: Any) -> None:
    for case in result["cases"]:
        counts = {row["method"]: row["parameters"] for row in case["rows"]}
        layers = 6 if "blocks" in case["name"] else 1
        assert counts.pop("SNELLA fused") == counts[snell.BASELINE] + 3 * layers
        assert len(set(counts.values())) == 1


def test_only_the_dense_reference_saves_matrices(result: Any) -> None:
    for case in result["cases"]:
        saved = {row["method"]: row["matrices_saved"] for row in case["rows"]}
        assert saved.pop(snell.DENSE) > 0
        assert set(saved.values()) == {0}


def test_results_become_a_page(result: Any) -> None:
    page = snell.REPORT.markdown([result])
    assert page.count("| SNELL fused |") == 2 and result["machine"]["torch"] in page
    assert "python -m benchmarks.snell" in snell.REPORT.markdown([])


def test_a_wrong_gradient_gets_no_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(snell, "VARIANTS", {"SNELL fused": snell.VARIANTS["SNELL fused"]})
    monkeypatch.setattr(snell.DenseSnell, "update", lambda self, W, mask: W * (W.abs() * mask))  # the full derivative
    snell.check.cache_clear()
    try:
        assert snell.main([*QUICK, "--json", str(tmp_path / "snell.json")]) == 1
    finally:
        snell.check.cache_clear()
    printed = capsys.readouterr().out
    assert not (tmp_path / "snell.json").exists()
    assert "SNELL fused: relative error" in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith("SNELL fused ")]
    assert [row[3:] for row in rows] == [["wrong", "-", "-", "-", "-"]] * 2


def test_a_mask_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = snell._largest
    monkeypatch.setattr(snell, "_largest", lambda magnitude, count: largest(magnitude, count + 10))
    wrong = snell.check.__wrapped__("SNELL additive", (40, 30), torch.device("cpu"))
    assert wrong == "the mask differs from the definition in 10 weights"


def test_the_docs_show_the_saved_results() -> None:
    page = snell.REPORT.page.read_text(encoding="utf-8")
    shown = snell.common.replace_block(page, "results", snell.REPORT.markdown(snell.REPORT.saved()))
    assert shown == page, "run `python -m benchmarks.snell --markdown`"
