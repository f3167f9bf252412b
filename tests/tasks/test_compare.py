from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_zoo.common.values import SettingError
from peft_zoo.tasks import compare as module
from peft_zoo.tasks.base.settings import TrainSettings
from peft_zoo.tasks.base.training import fit
from peft_zoo.tasks.compare import TUNING_SEED, ComparisonPlan, compare


@pytest.fixture
def plan(tiny_llama: Path, text_file: Path, tmp_path: Path) -> ComparisonPlan:
    places = {"model": str(tiny_llama), "data": str(text_file), "output": str(tmp_path / "out")}
    settings = TrainSettings(**places, steps=2, batch_size=4, max_length=16, eval_size=4)
    return ComparisonPlan(settings, {"snell": {"r": "4"}, "lora": {"r": "4"}}, [0.001, 0.1], [0, 1])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, float | None, int]]:
    """Notes each training run."""
    seen: list[tuple[str | None, float | None, int]] = []

    def noted(task: Any, model: nn.Module, data: Any) -> Any:
        seen.append((task.settings.method, task.settings.learning_rate, task.settings.seed))
        return fit(task, model, data)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "fit", noted)
    return seen


def test_methods_share_the_grid_and_a_stopped_comparison_continues(
    plan: ComparisonPlan, trained: list[Any], tmp_path: Path
) -> None:
    plan = dataclasses.replace(plan, learning_rates=[0.001, 0.01, 0.1])
    report = compare(plan)
    results = report["methods"]
    for method in ("snell", "lora"):
        runs = [run[1:] for run in trained if run[0] == method]
        best = results[method]["learning_rate"]
        assert runs == [(rate, TUNING_SEED) for rate in (0.001, 0.01, 0.1)] + [(best, 0), (best, 1)]
        validation = results[method]["validation"]
        assert validation[str(best)] == min(validation.values())
        assert results[method]["at_grid_edge"] == (best in (0.001, 0.1))
        assert list(results[method]["test"]) == ["0", "1"]
    assert results["snell"]["adapter_parameters"] == results["lora"]["adapter_parameters"] > 0
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == report
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert f"| lora | {results['lora']['adapter_parameters']:,} |" in table
    assert f"{results['snell']['mean']:.4f} ± {results['snell']['deviation']:.4f}" in table
    # The last runs are lost: only these are trained again.
    path = tmp_path / "out" / "runs.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == len(trained) == 10
    path.write_text("".join(lines[:-2]))
    trained.clear()
    again = compare(plan)
    assert len(trained) == 2
    for method in results:
        for key in ("learning_rate", "validation", "test", "mean"):
            assert again["methods"][method][key] == results[method][key]
    # Another seed needs one more run for each method.
    trained.clear()
    compare(dataclasses.replace(plan, seeds=[0, 1, 2]))
    assert [seed for _, _, seed in trained] == [2, 2]


def test_other_settings_are_other_runs(plan: ComparisonPlan, trained: list[Any]) -> None:
    plan = dataclasses.replace(plan, options={"lora": {"r": "4"}}, learning_rates=[0.1], seeds=[0])
    others = (
        plan,
        dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, steps=1)),
        dataclasses.replace(plan, options={"lora": {"r": "2"}}),
        plan,
    )
    counts = [len(trained) for each in others if compare(each)]
    assert counts == [2, 4, 6, 6]


def test_a_file_that_is_no_list_of_runs_is_left_alone(plan: ComparisonPlan, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs.jsonl").write_text("precious")
    with pytest.raises(SettingError, match=r"runs\.jsonl"):
        compare(plan)
    assert (tmp_path / "out" / "runs.jsonl").read_text() == "precious"


def test_heads_that_are_trained_whole_do_not_count_as_adapter(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_zoo.tasks.vision import VisionTask
    from tests.tasks.fixtures import tiny_vit

    monkeypatch.setattr(VisionTask, "_create", lambda self, name: tiny_vit(len(self._source.classes)))
    places = {"task": "vision", "data": str(image_folder), "output": str(tmp_path / "out")}
    settings = TrainSettings(**places, image_size=16, steps=1)
    result = compare(ComparisonPlan(settings, {"lora": {"r": "2"}}, [0.01], [0]))["methods"]["lora"]
    shapes = [tuple(layer.weight.shape) for layer in tiny_vit(2).modules() if isinstance(layer, nn.Linear)]
    assert result["adapter_parameters"] == sum(2 * (a + b) for a, b in shapes if (a, b) != (2, 24))
    assert result["deviation"] is None
    assert torch.isfinite(torch.tensor(result["mean"]))
