"""The study of recipes runs on a tiny model, remembers its runs, and prints every row."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import study
from benchmarks.squeeze import study as squeeze_study
from tests.tasks.fixtures import text_file, tiny_llama

__all__ = ["text_file", "tiny_llama"]

KEY = ("recipe", "rate", "seed", "split")


@pytest.mark.filterwarnings("ignore:.*keeps only .* of its energy:UserWarning")
def test_every_recipe_is_trained_and_remembered(
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["--model", str(tiny_llama), "--data", str(text_file), "--steps", "4", "--max-length", "16"]
    words += ["--eval-size", "2", "--rates", "0.001,0.01", "--seeds", "0,1", "--output", str(tmp_path)]
    assert squeeze_study.main(words) == 0
    table = capsys.readouterr().out
    for row in (*squeeze_study.RECIPES, "rank 64"):
        assert f"| {row} |" in table
    runs = (tmp_path / "runs.jsonl").read_text()
    recipes = [json.loads(line)["recipe"] for line in runs.splitlines()]
    assert len(recipes) == 4 * (2 + 2) and set(recipes) == set(squeeze_study.RECIPES)

    assert squeeze_study.main(words) == 0
    assert (tmp_path / "runs.jsonl").read_text() == runs, "nothing is trained twice"
    assert "rate 0.01 seed" not in capsys.readouterr().out

    monkeypatch.setattr(study, "ProcessPoolExecutor", OneThread)  # a process of its own takes longer than all of this
    apart = ["--only", "direct", "--rates", "0.01", "--jobs", "2", "--output", str(tmp_path / "jobs")]
    assert squeeze_study.main([*words, *apart]) == 0
    known = {tuple(run[key] for key in KEY): run["scores"] for run in map(json.loads, runs.splitlines())}
    again = [json.loads(line) for line in (tmp_path / "jobs" / "runs.jsonl").read_text().splitlines()]
    assert [(run["seed"], run["split"]) for run in again] == [(1000, "validation"), (0, "test"), (1, "test")]
    assert again[0]["scores"] == pytest.approx(known["direct", 0.01, 1000, "validation"])


class OneThread(ThreadPoolExecutor):
    """Instead of processes; what they are given has to be sent all the same."""

    def __init__(self, jobs: int, mp_context: Any) -> None:
        assert jobs == 2 and mp_context.get_start_method() == "spawn"
        super().__init__(1)

    def map(self, function: Any, *keys: Any) -> Any:  # type: ignore[override]
        return super().map(pickle.loads(pickle.dumps(function)), *keys)
