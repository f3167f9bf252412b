"""`peft-zoo compare`, in process; what a comparison does is tested in tests/tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_zoo.cli.main import main
from tests.cli.conftest import Mistake
from tests.tasks.fixtures import text_file, tiny_llama

__all__ = ["text_file", "tiny_llama"]  # fixtures of the tests below


@pytest.fixture
def words(tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peft_zoo.tasks.compare.fit", lambda *_: pytest.fail("something was trained"))
    return [
        *("compare", "--model", str(tiny_llama), "--data", str(text_file), "--output", "out", "--max-length", "16"),
        *("--methods", "snell,lora", "--learning-rates", "0.001,0.1", "--set", "snell.r=4", "--set", "lora.r=4"),
    ]


def test_a_dry_run_counts_the_runs(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--steps", "5", "--seeds", "3,4", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps"], plan["rates"], plan["seeds"], plan["runs"]) == (5, [0.001, 0.1], [3, 4], 8)
    assert plan["methods"] == {"snell": {"r": "4"}, "lora": {"r": "4"}}
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        (["--set", "lora.r=8"], ["different numbers of adapter parameters", "snell", "lora"]),
        (["--set", "r=8"], ["--set", "'r=", "METHOD.KEY=VALUE"]),
        (["--set", "lora.rank=8"], ["field of lora 'rank'"]),
        (["--methods", "snell,lora,nix"], ["method 'nix'"]),
        (["--learning-rates", "fast"], ["--learning-rates", "'fast'"]),
        (["--learning-rates", ""], ["--learning-rates is missing"]),
        (["--seeds", "0,x"], ["--seeds", "'0,x'"]),
        (["--seeds", ""], ["--seeds"]),
        (["--learning-rates", "-0.1"], ["--learning-rate", "-0.1"]),
    ],
)
def test_mistakes_are_reported_before_anything_is_trained(
    words: list[str], extra: list[str], parts: list[str], mistake: Mistake
) -> None:
    message = mistake([*words, *extra])
    assert all(part in message for part in parts), message
