from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_zoo.registration import methods
from peft_zoo.tasks import compare as module
from peft_zoo.tasks.base.training import fit
from peft_zoo.tasks.compare import TUNING_SEED, main


@pytest.fixture
def words(tiny_llama: Path, text_file: Path, tmp_path: Path) -> list[str]:
    return [
        *("--model", str(tiny_llama), "--data", str(text_file), "--output", str(tmp_path / "out")),
        *("--steps", "2", "--batch-size", "4", "--max-length", "16", "--eval-size", "4"),
        *("--methods", "snell,lora", "--learning-rates", "0.001,0.1", "--seeds", "0,1"),
        *("--set", "snell.r=4", "--set", "lora.r=4"),
    ]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, float | None, int]]:
    """Notes each training run."""
    seen: list[tuple[str | None, float | None, int]] = []

    def noted(task: Any, model: nn.Module, data: Any) -> Any:
        seen.append((task.settings.method, task.settings.learning_rate, task.settings.seed))
        return fit(task, model, data)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "fit", noted)
    return seen


def report(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "comparison.json").read_text())


def test_both_methods_get_the_same_grid_and_the_test_split_is_scored_once_a_seed(
    words: list[str], trained: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--learning-rates", "0.001,0.01,0.1"]) == 0
    results = report(tmp_path)["methods"]
    for method in ("snell", "lora"):
        runs = [run[1:] for run in trained if run[0] == method]
        best = results[method]["learning_rate"]
        assert runs == [(rate, TUNING_SEED) for rate in (0.001, 0.01, 0.1)] + [(best, 0), (best, 1)]
        validation = results[method]["validation"]
        assert validation[str(best)] == min(validation.values())
        assert results[method]["at_grid_edge"] == (best in (0.001, 0.1))
        assert list(results[method]["test"]) == ["0", "1"]
    assert results["snell"]["adapter_parameters"] == results["lora"]["adapter_parameters"] > 0
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert capsys.readouterr().out == table
    assert f"| lora | {results['lora']['adapter_parameters']:,} |" in table
    assert f"{results['snell']['mean']:.4f} ± {results['snell']['deviation']:.4f}" in table


def test_a_comparison_goes_on_where_it_was_stopped(words: list[str], trained: list[Any], tmp_path: Path) -> None:
    assert main(words) == 0
    whole = report(tmp_path)
    runs = tmp_path / "out" / "runs.jsonl"
    lines = runs.read_text().splitlines(keepends=True)
    assert len(lines) == len(trained) == 8
    runs.write_text("".join(lines[:-3]))
    trained.clear()
    assert main(words) == 0
    assert len(trained) == 3
    again = report(tmp_path)
    for method in whole["methods"]:
        for key in ("learning_rate", "validation", "test", "mean"):
            assert again["methods"][method][key] == whole["methods"][method][key]
    trained.clear()
    assert main([*words, "--seeds", "0,1,2"]) == 0
    assert [seed for _, _, seed in trained] == [2, 2]


def test_other_settings_are_other_runs(words: list[str], trained: list[Any]) -> None:
    words += ["--methods", "lora", "--set", "lora.bias=all", "--seeds", "0"]
    words = [word for word in words if word != "snell.r=4"]
    del words[words.index("--set")]
    assert main(words) == 0
    assert main([*words, "--steps", "3"]) == 0
    assert main([*words, "--set", "lora.r=2"]) == 0
    assert len(trained) == 9
    assert main(words) == 0
    assert len(trained) == 9


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        (["--set", "lora.r=8"], ["different numbers of adapter parameters", "snell", "lora", "--set METHOD.r"]),
        (["--set", "r=8"], ["--set cannot be 'r=8'", "METHOD.KEY=VALUE"]),
        (["--set", "lora.rank=8"], ["unknown field of lora 'rank'"]),
        (["--methods", "snell,lora,nix"], ["unknown method 'nix'"]),
        (["--learning-rates", "fast"], ["--learning-rates cannot be 'fast'"]),
        (["--learning-rates", ""], ["cannot be empty"]),
        (["--seeds", "0,x"], ["--seeds cannot be '0,x'"]),
        (["--learning-rates", "-0.1"], ["--learning-rate cannot be -0.1"]),
    ],
)
def test_mistakes_get_one_sentence_before_anything_is_trained(
    words: list[str], extra: list[str], parts: list[str], trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *extra]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(part in message for part in parts), message
    assert trained == []


def test_a_file_that_is_no_list_of_runs_is_left_alone(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs.jsonl").write_text("precious")
    assert main(words) == 2
    assert "is no list of runs" in capsys.readouterr().err
    assert (tmp_path / "out" / "runs.jsonl").read_text() == "precious"


def test_heads_that_are_trained_whole_do_not_count_as_adapter(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_zoo.tasks.vision import VisionTask
    from tests.tasks.fixtures import tiny_vit

    monkeypatch.setattr(VisionTask, "_create", lambda self, name: tiny_vit(len(self._source.classes)))
    words = ["--task", "vision", "--data", str(image_folder), "--image-size", "16", "--output", str(tmp_path / "out")]
    words += ["--steps", "1", "--methods", "lora", "--set", "lora.r=2", "--learning-rates", "0.01", "--seeds", "0"]
    assert main(words) == 0
    shapes = [tuple(layer.weight.shape) for layer in tiny_vit(2).modules() if isinstance(layer, nn.Linear)]
    in_blocks = [shape for shape in shapes if shape != (2, 24)]
    assert report(tmp_path)["methods"]["lora"]["adapter_parameters"] == sum(2 * (a + b) for a, b in in_blocks)
    assert report(tmp_path)["methods"]["lora"]["deviation"] is None
    assert torch.isfinite(torch.tensor(report(tmp_path)["methods"]["lora"]["mean"]))
    assert set(report(tmp_path)["methods"]) <= {*methods(), "lora"}
