"""The cost benchmark of compositions: one tiny measurement, wrong policies without numbers, saved results as a page."""

from __future__ import annotations

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


TINY = Shape(tiny, lambda: composition.unet_call(8, 3, 8), 2, 3)
CASE: dict[str, Any] = {"denoiser": "tiny", "adapters": 3, "rank": 2, "steps": 3, "macs": 10**9, "parameters": 10**6}
ROW = {"policy": ALONE, "forwards": 3, "full": 3, "macs_ratio": 1.0, "ratio": 1.0, "seconds": 0.5}


def test_the_cost_of_a_policy_is_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ("merge", "switch", "composite", "cmlora")
    monkeypatch.setattr(composition, "POLICIES", {name: POLICIES[name] for name in chosen})
    case = composition.measure("tiny", TINY, 3, 1, torch.device("cpu"))
    rows: dict[str, Any] = {row["policy"]: row for row in case["rows"]}
    assert list(rows) == [ALONE, *chosen] and case.keys() - {"rows"} == CASE.keys()
    assert [row["forwards"] for row in rows.values()] == [3, 3, 3, 9, 9]
    assert rows["switch"]["macs_ratio"] == rows[ALONE]["macs_ratio"] == 1
    assert rows["composite"]["macs_ratio"] == pytest.approx(3)
    assert 1 < rows["merge"]["macs_ratio"] < rows["cmlora"]["macs_ratio"] < 3
    assert rows["cmlora"]["full"] < 9 == rows["composite"]["full"]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 and row.keys() == ROW.keys() for row in rows.values())


def test_a_prediction_that_is_not_the_weighted_sum_is_wrong() -> None:
    first = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    weights = {"lora0": 0.25, "lora1": 0.75}
    right = 0.25 * first[0] + 0.75 * first[1]
    assert composition.wrong("composite", right, first, weights) is None
    assert composition.wrong("composite", right + 0.01, first, weights)
    assert composition.wrong("merge", right / 0, first, weights)


def test_a_wrong_policy_gets_no_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = {**CASE, "rows": [ROW, {"policy": "switch", "wrong": "it is 1 off"}]}
    monkeypatch.setattr(composition, "measure", lambda *_: case)
    monkeypatch.setattr(composition, "CPU", {"tiny": TINY})
    path = tmp_path / "composition.json"
    assert composition.main(["--device", "cpu", "--json", str(path)]) == 1
    printed = capsys.readouterr().out
    assert not path.exists() and "tiny, switch: it is 1 off" in printed
    (row,) = (line.split() for line in printed.splitlines() if line.startswith("switch "))
    assert row[1:] == ["wrong", *["-"] * (len(composition.HEADER) - 2)]


def test_results_become_a_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(composition, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(composition, "measure", lambda *_: {**CASE, "rows": [ROW]})
    monkeypatch.setattr(composition, "CPU", {"tiny": TINY})
    composition.PAGE.write_text("above <!-- begin: composition --><!-- end: composition --> below", encoding="utf-8")
    assert composition.main(["--markdown"]) == 0
    assert "Not measured yet: `python -m benchmarks.composition`" in composition.PAGE.read_text(encoding="utf-8")
    assert composition.main(["--device", "cpu", "--quick"]) == 0
    assert not list(tmp_path.glob("*.json")), "--quick saves nothing"
    assert composition.main(["--device", "cpu"]) == 0
    (tmp_path / "composition_study.json").write_text('{"rows": []}', encoding="utf-8")
    assert composition.main(["--markdown"]) == 0
    page = composition.PAGE.read_text(encoding="utf-8")
    assert page.startswith("above") and page.endswith("below") and page.count("**tiny: ") == 1
    assert f"| {ALONE} |" in page and "median of 3 generations" in page


def test_every_policy_has_a_row_in_the_saved_results() -> None:
    for result in composition.saved():
        for case in result["cases"]:
            assert [row["policy"] for row in case["rows"]] == [ALONE, *POLICIES]


def test_the_docs_show_the_saved_results() -> None:
    page = composition.PAGE.read_text(encoding="utf-8")
    shown = common.replace_block(page, "composition", composition.markdown(composition.saved()))
    assert shown == page, "run `python -m benchmarks.composition --markdown`"


@pytest.mark.parametrize(("make", "millions"), [(composition.sdxl, 2567), (composition.flux, 11891)])
def test_the_large_shapes_are_those_of_the_models(make: Any, millions: int) -> None:
    with torch.device("meta"):
        assert round(sum(p.numel() for p in make().parameters()) / 1e6) == millions
