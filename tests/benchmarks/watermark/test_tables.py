"""Tables of saved results, also of old ones, and the page of the method."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import common
from benchmarks.watermark import attacks, suite, tables

RESULTS = sorted(common.RESULTS.glob("watermark_*.json"))


def saved(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def result() -> dict[str, Any]:
    """A saved result with one run."""
    found = saved(common.RESULTS / "watermark_cpu.json")
    return {**found, "runs": {"two_sided/48/0": found["runs"]["two_sided/48/0"]}}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "page.md"
    path.write_text("# Mark\n\n<!-- begin: measured -->\nold\n<!-- end: measured -->\n\nend\n", encoding="utf-8")
    monkeypatch.setattr(tables, "PAGE", path)
    return path


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_saved_results_have_the_schema_and_give_tables(path: Path) -> None:
    result = saved(path)
    assert {"benchmark", "machine", "settings", "runs"} <= result.keys() and set(result["settings"]) <= {
        *suite.SETTINGS
    }
    for name, run in result["runs"].items():
        method, bits, _ = name.split("/")
        assert method in tables.NAMES and run["psnr"] > 20 and 0 < run["ssim"] <= 1
        assert list(run["found"]) == ["1, 0.01", "1, 1e-06", "9, 0.01", "9, 1e-06"]
        for groups in run["false_alarms"].values():
            assert list(groups) == ["1", "8", "32"] and groups["1"]["exact"] == groups["1"]["binomial"]
        if method != "full":
            assert set(run["attacks"]["images"]) <= {*attacks.IMAGES, "encoded again"}
            assert len(run["attacks"]["weights"]) <= len(attacks.WEIGHTS) + 1 + len(attacks.FINE_TUNING_STEPS)
        assert f"\n| {bits} bits, {tables.NAMES[method]} |" in tables.all_tables(result)


def test_tables_replace_the_block_of_the_page(page: Path) -> None:
    assert suite.main(["--docs", str(common.RESULTS / "watermark_cpu.json")]) == 0
    text = page.read_text(encoding="utf-8")
    assert "old" not in text and text.startswith("# Mark") and text.endswith("end\n")
    assert text.count("\n| 48 bits, LoRA |") == 2 and "| JPEG 50 |" in text and "fine-tuning, 100 steps" in text


def test_results_of_another_machine_join_without_their_times(
    page: Path, result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps(result), encoding="utf-8")
    run = {**result["runs"]["two_sided/48/0"], "psnr": 99.0, "seconds": 1e6}
    more = {**result, "runs": {"two_sided/48/7": run}, "settings": {**result["settings"], "device": "other"}}
    second.write_text(json.dumps(more), encoding="utf-8")
    assert suite.main(["--docs", str(first), str(second)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "two_sided/48/7" in text and "1000000" not in text
    assert f"| 48 bits, LoRA | {(result['runs']['two_sided/48/0']['psnr'] + 99) / 2:.1f} ± " in text
    result["settings"].pop("bit_target", None)  # as in results without this setting
    first.write_text(json.dumps(result), encoding="utf-8")
    assert suite.main(["--docs", str(first), str(second)]) == 0
    for name, value in (("steps", 5), ("bit_target", 0.9)):
        second.write_text(json.dumps({**more, "settings": {**more["settings"], name: value}}), encoding="utf-8")
        for order in ((first, second), (second, first)):
            assert suite.main(["--docs", *map(str, order)]) == 1
            assert f"results differ in {name};" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == text


def test_old_results_get_a_dash(result: dict[str, Any]) -> None:
    new = result["runs"]["two_sided/48/0"]
    old = copy.deepcopy(new)
    for groups in old["false_alarms"].values():
        for rates in groups.values():
            del rates["exact, 0.01"], rates["binomial, 0.01"]
    del old["attacks"]["controls"], old["attacks"]["images"]["JPEG 50"], old["attacks"]["weights"]["mark of rank 1"]
    for runs in ({"two_sided/48/0": old, "two_sided/48/1": new}, {"two_sided/48/0": new, "two_sided/48/1": old}):
        lines = tables.all_tables({"runs": runs}).splitlines()
        assert any(line.startswith("| JPEG 50 | - |") for line in lines) and "| mark of rank 1 | - |" in lines
        assert not any(line.startswith("| JPEG 80 | -") for line in lines)
        one = next(line.rstrip(" |") for line in lines if line.startswith("| 8 (48 bits) |"))
        assert [cell == "-" for cell in one.split(" | ")[1:]] == [False, False, True, True] * 2
    lines = tables.all_tables({"runs": {"two_sided/48/0": old}}).splitlines()
    assert not any("JPEG 50 " in line or "exact, 0.01" in line or "clean images, 48 bits" in line for line in lines)


def test_cells() -> None:
    runs = {bits: [{"false_alarms": {"here": {"1": {"exact": bits / 1e4}}}}] for bits in (16, 48)}
    text = tables.alarm_table(runs)
    assert "| 1 (16 bits) | 1.6e-03 |" in text and "| 1 (48 bits) | 4.8e-03 |" in text and "here, exact" in text
    timed = [{"seconds_to_99": value, "parameters": 5, "seconds": 2.0} for value in (1.0, None, 2.0)]
    assert "| 16 bits, LoRA | 5 | 2.0 | 1.5 (2 of 3) |" in tables.cost_table({("two_sided", 16): timed})
