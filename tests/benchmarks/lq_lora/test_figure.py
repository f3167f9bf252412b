"""The figure of perplexity against bits has a point for every recipe, before and after tuning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks.lq_lora import figure as lq_lora_figure
from benchmarks.lq_lora.figure import BEFORE, points

AFTER = {"LoRA": 6.0, "QLoRA 4.13": 6.5, "LQ-LoRA 4": 6.6, "LQ-LoRA 2.75": 11.5, "LQ-LoRA (fitted) 3": 7.0}
ROWS = {name: {"mean": mean} for name, mean in AFTER.items()}
ROWS |= {name + BEFORE: {"mean": 2 * mean} for name, mean in AFTER.items()}


def test_points_are_ordered_by_bits() -> None:
    found = points(ROWS)
    assert found["LQ-LoRA"] == [(2.75, 23.0, 11.5), (4.0, 13.2, 6.6)]
    assert found["LoRA"] == [(16.0, 12.0, 6.0)]
    assert found["LQ-LoRA (fitted)"] == [(3.0, 14.0, 7.0)]
    assert set(found) == {"LoRA", "QLoRA", "LQ-LoRA", "LQ-LoRA (fitted)"}


def test_the_figure_is_written_and_the_same_each_time(tmp_path: Path) -> None:
    saved = tmp_path / "study.json"
    saved.write_text(json.dumps({"rows": ROWS}))
    drawn = []
    for name in ("one.svg", "two.svg"):
        assert lq_lora_figure.main(["--json", str(saved), "--output", str(tmp_path / name)]) == 0
        drawn.append((tmp_path / name).read_text())
    assert drawn[0] == drawn[1] and "<svg" in drawn[0]
