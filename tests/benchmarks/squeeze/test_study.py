"""Studies remember runs, tune each recipe on the validation split and print every row; training itself is replaced."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks import study
from benchmarks.squeeze import study as squeeze_study
from peft_zoo.common.settings import resolve_settings
from peft_zoo.tasks.base.settings import TrainSettings

KEY = ("recipe", "rate", "seed", "split")


class OneThread(ThreadPoolExecutor):
    """Replaces the process pool by a thread; functions are still pickled."""

    def __init__(self, jobs: int, mp_context: Any) -> None:
        assert jobs == 2 and mp_context.get_start_method() == "spawn"
        super().__init__(1)

    def map(self, function: Any, *keys: Any) -> Any:  # type: ignore[override]
        return super().map(pickle.loads(pickle.dumps(function)), *keys)


def train(self: study.Study, name: str, rate: float, seed: int, split: str) -> study.Run:
    """A run whose best learning rate is 0.01."""
    scores = {name: 5 + abs(rate - 0.01) + seed / 1000, **({"rank 64": 7.0} if name == "post" else {})}
    print(f"now training {name} {rate:g}")
    return {**self._full((name, rate, seed, split)), "scores": scores, "parameters": 1234, "seconds": 1.0}


def test_every_recipe_is_tuned_and_remembered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study.Study, "train", train)
    words = ["--rates", "0.001,0.01,0.1", "--seeds", "0,1", "--output", str(tmp_path), "--json", str(tmp_path / "json")]
    assert squeeze_study.main(words) == 0
    assert "| post | 1,234 | 0.01 | 5.001 ± 0.001 | 5.000, 5.001 | 1 |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "json").read_text())["rows"]
    assert list(rows) == ["direct", "post", "rank 64", "cont", "in"]
    assert rows["in"]["validation"].keys() == {"0.001", "0.01", "0.1"} and not rows["in"]["at_grid_edge"]
    runs = (tmp_path / "runs.jsonl").read_text()
    recipes = [json.loads(line)["recipe"] for line in runs.splitlines()]
    assert len(recipes) == 4 * (3 + 2) and set(recipes) == set(squeeze_study.RECIPES)

    assert squeeze_study.main(words) == 0
    assert (tmp_path / "runs.jsonl").read_text() == runs and "now training" not in capsys.readouterr().out

    monkeypatch.setattr(study, "ProcessPoolExecutor", OneThread)
    jobs = ["--only", "direct", "--rates", "0.01", "--jobs", "2", "--output", str(tmp_path / "jobs")]
    assert squeeze_study.main([*words, *jobs]) == 0
    known = {tuple(run[key] for key in KEY): run["scores"] for run in map(json.loads, runs.splitlines())}
    again = [json.loads(line) for line in (tmp_path / "jobs" / "runs.jsonl").read_text().splitlines()]
    assert [(run["seed"], run["split"]) for run in again] == [(1000, "validation"), (0, "test"), (1, "test")]
    assert again[0]["scores"] == known["direct", 0.01, 1000, "validation"]


def test_post_is_scored_before_and_after_its_squeeze(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(r=16, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(32, 32)), config)
    model.base_model.model[0].lora_B["default"].weight.data *= 0.5 ** torch.arange(16)
    monkeypatch.setattr(
        squeeze_study, "perplexity", lambda row, task, model, data: {row: model.peft_config["default"].r}
    )
    assert squeeze_study.score("post", None, model, None) == {"rank 64": 16, "post": 8}  # type: ignore[arg-type]
    assert squeeze_study.score("in", None, model, None) == {"in": 8}  # type: ignore[arg-type]


def test_recipes_have_valid_options() -> None:
    for recipe in squeeze_study.RECIPES.values():
        resolve_settings(TrainSettings, {"task": "language", "method": recipe.method}, {"options": recipe.options})
