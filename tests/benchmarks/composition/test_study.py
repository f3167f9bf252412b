"""The study of rules runs on a tiny denoiser, remembers what it did, and prints every row."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks.composition import study as composition_study
from benchmarks.composition.study import (
    ALONE,
    NOTHING,
    OURS,
    PAGE,
    RULES,
    STEPS,
    page_block,
    recipe,
    summarize,
    tables,
)
from peft_zoo.adapters.cached_lora.schedule import Planner
from peft_zoo.tasks.diffusion.concepts import CONCEPTS
from tests.tasks.diffusion.samples import garment_file, tiny_base

__all__ = ["garment_file", "tiny_base"]


@pytest.mark.slow
def test_every_rule_draws_and_is_remembered(
    garment_file: Path,
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PEFT_ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("peft_zoo.tasks.diffusion.factors.SIZE", 16)
    monkeypatch.setattr(composition_study, "STEPS", 2)
    monkeypatch.setattr("peft_zoo.tasks.diffusion.factors.train_judge.__defaults__", (2,))
    monkeypatch.setattr(composition_study, "RESULTS", tmp_path / "results")
    rules = {name: RULES[name] for name in ("merge", "switch, every step", OURS, "cmlora, low before high")}
    monkeypatch.setattr(composition_study, "RULES", rules)
    monkeypatch.setattr(composition_study, "CONCEPTS", CONCEPTS[1:])
    words = ["--data", str(garment_file), "--model", str(tiny_base), "--train-steps", "2", "--images", "2"]
    words += ["--rank", "2", "--seeds", "0", "--output", str(tmp_path / "runs")]
    level = logging.getLogger("transformers").level
    assert composition_study.main(words) == 0
    printed = capsys.readouterr().out
    for rule in (*rules, NOTHING):
        assert f"| 2, {rule} |" in printed and f"| 3, {rule} |" in printed
    assert all(f"| {concept} |" in printed for concept in CONCEPTS[1:])
    record = (tmp_path / "runs" / "runs.json").read_text()
    assert len(json.loads(record)) == 1 + 3 + 1 + 3 + 7 + 4 * len(rules)
    assert (tmp_path / "runs" / f"checker+square {OURS}.png").is_file()

    assert composition_study.main([*words, "--save"]) == 0
    again = capsys.readouterr().out
    assert "train/0/square" in printed and "train/0/square" not in again
    assert again.strip() == printed[printed.index("\nAccuracy") :].strip()
    assert (tmp_path / "runs" / "runs.json").read_text() == record, "nothing is done twice"
    report = json.loads((tmp_path / "results" / "composition_study.json").read_text())
    assert {row["rule"] for row in report["rows"]} == {*rules, NOTHING}
    assert str(tmp_path) not in json.dumps(report)
    monkeypatch.setattr(composition_study, "PAGE", tmp_path / "page.md")
    composition_study.PAGE.write_text("<!-- begin: composition-study --><!-- end: composition-study -->")
    assert composition_study.main(["--markdown"]) == 0
    page = composition_study.PAGE.read_text()
    assert tables(report) in page and "Seeds 0; 2 pictures" in page
    with pytest.raises(SystemExit, match=r"has results for .*'images': 2.*: give another --output"):
        composition_study.main([*words, "--images", "3"])
    logging.getLogger("transformers").setLevel(level)


def runs(joint: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """A record with these joint scores of two pairs by rule."""
    record: dict[str, dict[str, float]] = {}
    for concept in CONCEPTS:
        record[f"train/0/{concept}"] = {"error before": 2.0, "error after": 1.0}
        for rule in (ALONE, NOTHING):
            cell = {"joint": 0.5, "kind": 1.0, concept: 0.75, "passes": 20, "macs": 4.0, "seconds": 2.0}
            record[f"draw/0/{rule}/{concept}"] = cell
    record["profile/0"] = {"shares": dict.fromkeys(CONCEPTS, 0.25)}  # type: ignore[dict-item]
    for rule, values in joint.items():
        for pair, value in zip((("bag", "checker"), ("bag", "square")), values, strict=True):
            cell = {"joint": value, "kind": 1.0, pair[0]: 0.2, pair[1]: 0.4, "passes": 40, "macs": 6.0, "seconds": 5.0}
            record[f"draw/0/{rule}/{'+'.join(pair)}"] = cell
    return record


def test_the_summary_counts_cells_and_compares_within_them() -> None:
    report = summarize(runs({OURS: [0.5, 0.9], "merge": [0.3, 0.6]}), [0])
    row = next(row for row in report["rows"] if row["rule"] == "merge")
    assert row["joint"] == pytest.approx(0.45) and row["joint error"] == pytest.approx(0.15)
    assert row["less"] == pytest.approx(0.25) and row["less error"] == pytest.approx(0.05)
    assert row["present"] == pytest.approx(0.3) and row["cells"] == 2
    assert (row["passes"], row["macs"], row["seconds"]) == (2.0, 1.5, 2.5)
    assert report["alone"]["square"] == {
        "none": 0.75,
        "own": 0.75,
        "joint": 0.5,
        "share": 0.25,
        "before": 2,
        "after": 1,
    }


def test_recipes_follow_the_measured_frequencies() -> None:
    found = {
        "shares": {"bag": 0.2, "checker": 0.9, "square": 0.5},
        "spectra": dict.fromkeys(CONCEPTS, (1.0,)),
        "h": 0.2,
    }
    config = recipe(OURS, ["bag", "checker", "square"], found)
    assert (config.order, config.high, config.low) == ("profile", ["checker"], ["square", "bag"])
    turned = recipe("cmlora, low before high", ["bag", "checker", "square"], found)
    assert (turned.high, turned.low) == (["bag", "square"], ["checker"])
    assert recipe("cmlora without cache", ["bag", "checker"], found).cache is False
    weighted = recipe("w_switch, 2:1", ["bag", "checker", "square"], found)
    assert (weighted.method, weighted.weights) == ("w_switch", {"bag": 2.0, "checker": 1.0, "square": 1.0})
    assert recipe("w_switch, every step", ["bag", "checker"], found).weights is None
    assert recipe("switch, every step", ["bag", "checker"], found).switch_every == 1


@pytest.mark.parametrize(
    ("chosen", "turns"), [(["bag", "square"], [14, 6]), (["bag", "checker", "square"], [10, 6, 4])]
)
def test_the_first_of_weighted_switches_has_most_of_the_steps(chosen: list[str], turns: list[int]) -> None:
    planner = Planner(config := recipe("w_switch, 2:1", chosen, {}), config.roles(chosen))
    steps = [planner.plan(step, step / STEPS).dominant for step in range(STEPS)]
    assert [steps.count(name) for name in chosen] == turns


def test_the_docs_show_the_saved_study() -> None:
    report = json.loads((common.RESULTS / "composition_study.json").read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    shown = common.replace_block(page, "composition-study", page_block(report))
    assert shown == page, "run `python -m benchmarks.composition.study --markdown`"
