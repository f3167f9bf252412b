"""The benchmark of `extract_lora` at small sizes, and the page with the saved result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import extract


def test_both_are_measured(tmp_path: Path) -> None:
    assert extract.main(["--quick", "--json", str(tmp_path / "result.json")]) == 0
    ours, peer = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert (ours["method"], peer["method"]) == (extract.OURS, extract.PEER) and ours["ranks"] == [extract.RANK]
    assert ours["error"] == pytest.approx(peer["error"], rel=0.01)


def test_the_page_has_the_saved_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "extract.md"
    page.write_text(extract.PAGE.read_text())
    monkeypatch.setattr(extract, "PAGE", page)
    assert extract.main(["--markdown"]) == 0
    assert page.read_text() == (extract.common.ROOT / "docs" / "extract.md").read_text()


def test_a_larger_error_is_no_result() -> None:
    rows = [{"method": extract.OURS, "error": 0.2}, {"method": extract.PEER, "error": 0.1}]
    assert "0.2" in extract.wrong_rows(rows)[0] and not extract.wrong_rows([{**row, "error": 0.1} for row in rows])
