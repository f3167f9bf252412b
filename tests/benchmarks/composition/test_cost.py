"""The benchmark of compositions on the smallest shapes: every policy has a row, and nothing wrong gets a number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import common
from benchmarks.composition import cost as composition
from benchmarks.composition.cost import ALONE, POLICIES, Shape


def tiny() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


@pytest.fixture(autouse=True)
def shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "CPU", {"tiny": Shape(tiny, lambda: composition.unet_call(8, 3, 8), 2, 6)})


ARGUMENTS = ["--device", "cpu", "--repeats", "1"]


def test_every_policy_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "composition.json"
    assert composition.main([*ARGUMENTS, "--json", str(path)]) == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    (case,) = result["cases"]
    rows: dict[str, Any] = {row["policy"]: row for row in case["rows"]}
    assert list(rows) == [ALONE, *POLICIES] and case["adapters"] == 3 and case["steps"] == 6
    assert [rows[name]["forwards"] for name in (ALONE, "merge", "switch", "composite", "cmlora")] == [6, 6, 6, 18, 18]
    assert rows["switch"]["macs_ratio"] == rows["w_switch"]["macs_ratio"] == rows[ALONE]["macs_ratio"] == 1
    assert rows["merge"]["macs_ratio"] == rows["merge_normalized"]["macs_ratio"]
    assert rows["composite"]["macs_ratio"] == rows["composite, batched"]["macs_ratio"] == pytest.approx(3)
    assert 1 < rows["merge"]["macs_ratio"] < rows["cmlora"]["macs_ratio"] < 3
    assert rows["cmlora"]["full"] < 18 == rows["composite"]["full"]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in rows.values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in (ALONE, *POLICIES))


def test_a_wrong_policy_gets_no_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(composition, "POLICIES", {"composite": {"method": "switch"}, "switch": {"method": "merge"}})
    path = tmp_path / "composition.json"
    assert composition.main([*ARGUMENTS, "--json", str(path)]) == 1
    printed = capsys.readouterr().out
    assert not path.exists() and "tiny, switch: it is" in printed
    (row,) = (line.split() for line in printed.splitlines() if line.startswith("switch "))
    assert row[1:] == ["wrong", *["-"] * (len(composition.HEADER) - 2)]


def test_results_become_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(composition, "PAGE", tmp_path / "page.md")
    composition.PAGE.write_text("above <!-- begin: composition --><!-- end: composition --> below", encoding="utf-8")
    assert composition.main(["--markdown"]) == 0
    assert "Not measured yet: `python -m benchmarks.composition`" in composition.PAGE.read_text(encoding="utf-8")
    assert composition.main(ARGUMENTS) == 0
    (tmp_path / "composition_study.json").write_text('{"rows": []}', encoding="utf-8")
    assert composition.main(["--markdown"]) == 0
    page = composition.PAGE.read_text(encoding="utf-8")
    assert page.startswith("above") and page.endswith("below") and page.count("**tiny: ") == 1
    assert all(f"| {name} |" in page for name in (ALONE, *POLICIES)) and "median of 1 generations" in page


def test_the_docs_show_the_saved_results() -> None:
    page = composition.PAGE.read_text(encoding="utf-8")
    shown = common.replace_block(page, "composition", composition.markdown(composition.saved()))
    assert shown == page, "run `python -m benchmarks.composition --markdown`"


def test_quick_is_short_and_saves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert composition.main([*ARGUMENTS, "--quick", "--adapters", "2"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("make", "millions"), [(composition.sdxl, 2567), (composition.flux, 11891)])
def test_the_large_shapes_are_those_of_the_models(make: Any, millions: int) -> None:
    with torch.device("meta"):
        assert round(sum(p.numel() for p in make().parameters()) / 1e6) == millions
