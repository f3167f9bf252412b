"""`peft-zoo train`, in process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_zoo.cli.main import main
from tests.cli.conftest import Mistake
from tests.tasks.fixtures import text_file, tiny_llama

__all__ = ["text_file", "tiny_llama"]  # fixtures of the tests below


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The settings that a dry run prints."""
    assert main(["train", *words, "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_flags_win_over_the_file_and_the_file_over_the_preset(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "run.yaml").write_text("steps: 11\nseed: 5\nset:\n  r: 4\n  sparsity: 0.5\n")
    settings = planned(
        ["--preset", "demo", "--config", "run.yaml", "--seed", "6", "--set", "r=16", "--set", "bias=none"], capsys
    )
    assert (settings["steps"], settings["seed"]) == (11, 6)
    assert settings["options"] == {"r": "16", "sparsity": "0.5", "bias": "none"}
    preset = planned(["--preset", "demo"], capsys)
    assert settings["model"] == preset["model"] and preset["steps"] != 11
    assert [path.name for path in here.iterdir()] == ["run.yaml"]


def test_an_option_may_contain_an_equals_sign(capsys: pytest.CaptureFixture[str]) -> None:
    settings = planned(["--method", "lora", "--set", "target_modules=a=b"], capsys)
    assert settings["options"] == {"target_modules": "a=b"}
    assert main(["train", "--method", "lora", "--steps", "3", "--dry-run"]) == 0
    assert "steps       3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["--method is missing"]),
        (["--task", "visoin"], ["task 'visoin'", "'vision'", "language"]),
        (["--method", "snel"], ["method 'snel'", "'snell'", "lora"]),
        (["--method", "lora", "--data", "shakespear"], ["data set", "shakespeare", ".jsonl"]),
        (["--method", "lora", "--learning-rate", "fast"], ["--learning-rate", "'fast'"]),
        (["--method", "lora", "--learning-rate", "-1"], ["--learning-rate", "-1.0"]),
        (["--method", "lora", "--set", "rank=8"], ["field of lora 'rank'", "lora_alpha"]),
        (["--method", "lora", "--set", "r=8.5"], ["lora field 'r'", "'8.5'"]),
        (["--method", "snell", "--set", "sparsity=2"], ["sparsity", "2"]),
        (["--preset", "dmeo"], ["preset 'dmeo'", "'demo'"]),
        (["--config", "none.yaml"], ["--config", "'none.yaml'"]),
        (["--task", "vision", "--method", "lora"], ["--data", "train/CLASS", ".npz"]),
    ],
)
def test_mistakes(words: list[str], parts: list[str], mistake: Mistake, here: Path) -> None:
    message = mistake(["train", *words])
    assert all(part in message for part in parts), message


@pytest.fixture
def words(tiny_llama: Path, text_file: Path) -> list[str]:
    places = ["--model", str(tiny_llama), "--data", str(text_file), "--output", "out"]
    return ["train", "--method", "lora", *places, "--steps", "2", "--max-length", "16", "--set", "r=2"]


def test_a_run_prints_its_summary_and_leaves_its_files(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(words) == 0
    printed = capsys.readouterr().out
    summary = json.loads(Path("out/summary.json").read_text())
    for stage in ("before", "after", "reloaded", "merged"):
        assert f"{summary['scores'][stage]['value']:.4f}" in printed
    assert str(Path("out/report.html")) in printed and Path("out/report.html").is_file()
    assert json.loads(Path("out/adapter_config.json").read_text())["r"] == 2
    # The same again, as JSON, and with a check that fails.
    monkeypatch.setattr("peft_zoo.tasks.base.outcome.MERGE_TOLERANCE", -1.0)
    assert main([*words, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["scores"] == summary["scores"] and data["checks"]["merge_matches"] is False
