"""The study of recipes runs on a tiny model, remembers its runs, and prints every row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import squeeze_study
from tests.tasks.fixtures import text_file, tiny_llama

__all__ = ["text_file", "tiny_llama"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*keeps only .* of its energy:UserWarning")
def test_every_recipe_is_trained_and_remembered(
    tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
