"""The study of rules: recipes, its record of finished runs, the summary, and saved results on the page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

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
    Study,
    page_block,
    recipe,
    summarize,
    tables,
)
from peft_zoo.adapters.cached_lora.schedule import Planner
from peft_zoo.tasks.diffusion.composition import load_adapters
from peft_zoo.tasks.diffusion.concepts import CONCEPTS
from peft_zoo.tasks.diffusion.factors import FactorClassifier
from peft_zoo.tasks.diffusion.pipeline import load_pipeline
from tests.tasks.diffusion.samples import garment_file, tiny_base

__all__ = ["garment_file", "tiny_base"]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Study]:
    """Makes studies that share a folder, without a base model and a classifier."""
    monkeypatch.setattr(composition_study, "model_folder", lambda model, data: Path("base"))
    monkeypatch.setattr(composition_study, "load_judge", lambda data: (None, {"kind": 0.9}))

    def make(**settings: int) -> Study:
        values = {"train_steps": 2, "rank": 2, "images": 3, "data": "none", "model": None, "output": str(tmp_path)}
        return Study(argparse.Namespace(**{**values, **settings}))

    return make


def test_nothing_is_done_twice(study: Callable[..., Study]) -> None:
    work = iter([{"joint": 0.5}])
    assert study().run("draw/0/merge/bag", lambda: next(work)) == {"joint": 0.5}
    assert study().run("draw/0/merge/bag", lambda: next(work)) == {"joint": 0.5}
    with pytest.raises(SystemExit, match="--output"):
        study(images=4)


def test_an_adapter_is_trained_and_drawn(study: Callable[..., Study], garment_file: Path, tiny_base: Path) -> None:
    made = study(train_steps=1, data=str(garment_file))
    made.base, made.judge = tiny_base, FactorClassifier(16).eval()
    assert made.train("checker", 0).keys() == {"error before", "error after", "seconds"}
    load_adapters(pipe := load_pipeline(tiny_base), {"checker": made.adapter("checker", 0)})
    run = made.draw(pipe, recipe(ALONE, ["checker"], {}), ["checker"], 0, ALONE)
    assert run.keys() == {"joint", "kind", "checker", "passes", "macs", "seconds"}
    assert run["passes"] == STEPS and (made.folder / f"checker {ALONE}.png").is_file()


def test_a_seed_trains_every_concept_and_draws_every_set_by_every_rule(
    study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composition_study, "load_pipeline", lambda folder: Mock())
    monkeypatch.setattr(composition_study, "load_adapters", lambda pipe, folders: None)
    made = study()
    shares = {name: place / 4 for place, name in enumerate(CONCEPTS)}
    profile = {"shares": shares, "spectra": {name: [1.0] for name in CONCEPTS}, "h": 0.2}
    for name, result in (("train", {}), ("plain", {}), ("draw", {}), ("profile", profile)):
        monkeypatch.setattr(made, name, lambda *_, result=result: result)
    made.seed(0)
    singles, sets = len(CONCEPTS), 6 + 4
    assert len(made.runs) == 1 + singles + 1 + 2 * singles + sets * (1 + len(RULES))
    assert made.labels(["bag"]) == [8, 8, 8] and made.labels(["checker"]) == [0, 1, 2]


def test_the_page_has_a_row_for_every_rule_and_concept() -> None:
    report = summarize(runs({OURS: [0.5, 0.9], "merge": [0.3, 0.6]}), [0])
    shown = tables(report)
    assert all(f"| 2, {rule} |" in shown for rule in (OURS, "merge"))
    assert all(f"| {name} |" in shown for name in CONCEPTS)
    saved = json.loads((common.RESULTS / "composition_study.json").read_text(encoding="utf-8"))
    assert saved.keys() == {"machine", "settings", "judge", *report}
    assert all(row.keys() <= report["rows"][0].keys() for row in saved["rows"])
    assert {row["rule"] for row in saved["rows"]} == {*RULES, NOTHING}


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
