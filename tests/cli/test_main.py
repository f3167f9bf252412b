"""The command line, in process: `main` takes the words and returns the exit status."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_zoo.cli.main import main
from peft_zoo.registration import methods
from peft_zoo.tasks.base.outcome import Outcome
from peft_zoo.tasks.base.settings import TrainSettings, flag, flag_fields
from peft_zoo.tasks.base.task import Task
from tests.tasks.fixtures import text_file, tiny_llama

__all__ = ["text_file", "tiny_llama"]  # fixtures of the tests below


@pytest.fixture(autouse=True)
def untouched_process() -> Iterator[None]:
    """What `main` sets up for its process must not leak into other tests."""
    root, own = logging.getLogger(), logging.getLogger("peft_zoo")
    handlers, level = root.handlers[:], own.level
    with warnings.catch_warnings():
        yield
    root.handlers[:] = handlers
    own.setLevel(level)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[TrainSettings]:
    """Catches the settings of each run instead of running it."""
    seen: list[TrainSettings] = []

    def catch(task: Task) -> Outcome:
        seen.append(task.settings)
        raise SystemExit(0)

    monkeypatch.setattr("peft_zoo.tasks.base.training.train", catch)
    monkeypatch.chdir(tmp_path)
    return seen


def settings_of(words: list[str], chosen: list[TrainSettings]) -> TrainSettings:
    with pytest.raises(SystemExit):
        main(["train", *words])
    return chosen[-1]


def test_help_names_every_flag_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(flag(item.name) in text for item in flag_fields())
    assert "peft-zoo train --preset demo" in text


def test_methods_lists_every_registered_method_with_its_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for method in methods().values():
        assert method.name in text
        assert method.parameters in text
    assert "lora" in text


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path, chosen: list[TrainSettings]) -> None:
    (tmp_path / "run.yaml").write_text("steps: 11\nseed: 5\nset:\n  r: 4\n  sparsity: 0.5\n")
    words = ["--preset", "demo", "--config", "run.yaml", "--seed", "6", "--set", "r=16"]
    settings = settings_of(words, chosen)
    assert (settings.steps, settings.seed) == (11, 6)
    assert settings.options["r"] == "16"
    assert settings.options["sparsity"] == "0.5"
    preset = settings_of(["--preset", "demo"], chosen)
    assert settings.model == preset.model
    assert preset.steps != 11


def test_an_option_may_contain_an_equals_sign(chosen: list[TrainSettings]) -> None:
    assert settings_of(["--method", "lora", "--set", "target_modules=a=b"], chosen).options == {"target_modules": "a=b"}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["required"]),
        (["trian"], ["'trian'", "methods", "train"]),
        (["train", "--methd", "snell"], ["'--methd'", "did you mean --method?"]),
        (["train", "--steps"], ["--steps"]),
        (["train", "--task", "visoin"], ["unknown task 'visoin'", "did you mean 'vision'", "language"]),
        (["train", "--method", "snel"], ["unknown method 'snel'", "did you mean 'snell'", "lora"]),
        (["train"], ["--method is missing"]),
        (["train", "--method", "lora", "--data", "shakespear"], ["unknown data set", "shakespeare", "gsm8k", ".jsonl"]),
        (["train", "--method", "lora", "--steps", "ten"], ["--steps cannot be 'ten'", "whole number"]),
        (["train", "--method", "lora", "--learning-rate", "fast"], ["--learning-rate cannot be 'fast'", "0.001"]),
        (["train", "--method", "lora", "--learning-rate", "-1"], ["--learning-rate cannot be -1.0", "above 0"]),
        (["train", "--method", "lora", "--set", "r"], ["--set cannot be 'r'", "--set r=8"]),
        (["train", "--method", "lora", "--set", "rank=8"], ["unknown field of lora 'rank'", "lora_alpha"]),
        (["train", "--method", "lora", "--set", "r=8.5"], ["lora field 'r' cannot be '8.5'", "whole number"]),
        (["train", "--method", "snell", "--set", "sparsity=2"], ["sparsity", "2"]),
        (["train", "--preset", "dmeo"], ["unknown preset 'dmeo'", "did you mean 'demo'"]),
        (["train", "--config", "none.yaml"], ["'none.yaml' cannot be read"]),
        (["train", "--task", "vision", "--method", "lora"], ["--data is missing", "train/CLASS", ".npz"]),
    ],
)
def test_mistakes_get_one_sentence_on_stderr_and_status_2(
    words: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    streams = capsys.readouterr()
    message = streams.err.strip().splitlines()[-1]
    assert message.startswith("peft-zoo: ")
    assert all(part in message for part in parts), message
    assert "Traceback" not in streams.err
    assert streams.out == ""


@pytest.fixture
def words(tiny_llama: Path, text_file: Path, tmp_path: Path) -> list[str]:
    places = ["--model", str(tiny_llama), "--data", str(text_file), "--output", str(tmp_path / "out")]
    return ["train", "--method", "lora", *places, "--steps", "2", "--max-length", "16", "--set", "r=2"]


def test_a_run_prints_its_summary_and_leaves_its_files(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(words) == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for stage in ("before", "after", "reloaded", "merged"):
        assert f"{summary['scores'][stage]['value']:.4f}" in printed
    assert str(tmp_path / "out" / "report.html") in printed
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2


def test_a_failed_check_ends_in_status_1(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_zoo.tasks.base.outcome.MERGE_TOLERANCE", -1.0)
    assert main(words) == 1
