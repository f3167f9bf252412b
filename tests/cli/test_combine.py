"""`peft-zoo combine`, in process: what it writes is what the library writes, and mistakes cost one sentence."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from peft_zoo.cli.combine import OWN, Flags
from peft_zoo.cli.main import main
from peft_zoo.merge import combine
from peft_zoo.merge.combining.options import CombineOptions
from tests.cli.conftest import Mistake
from tests.merge.samples import WEIGHTS, saved


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("saved")
    return [str(saved(folder / "one")), str(saved(folder / "two", r=4, use_rslora=True))]


def test_every_option_of_the_library_is_a_flag() -> None:
    names = {item.name for item in fields(Flags)} - set(OWN) - {"weights"}
    assert names == {item.name for item in fields(CombineOptions)}


def test_it_writes_what_the_library_writes(pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = combine(pair, tmp_path / "a", weights=[0.7, -0.3], rank=4, per_module={"conv*": [1, 0]})
    words = ["combine", *pair, "-o", str(tmp_path / "b"), "--weights", "0.7,-0.3", "--rank", "4"]
    assert main([*words, "--per-module", "conv*=1,0", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    assert data == {**report.to_dict(), "adapters": ["one", "two"], "written": str(tmp_path / "b")} | {
        "modules": json.loads(json.dumps(report.to_dict()["modules"]))
    }
    assert main(["combine", *pair, "-o", str(tmp_path / "c")]) == 0
    assert "2 adapters, cat" in capsys.readouterr().out


def test_analysis_and_dry_runs_write_nothing(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["combine", *pair, "--analyze", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["pairs"]) == 5
    words = ["combine", *pair, "-o", str(tmp_path / "out"), "--method", "ties", "--density", "0.5"]
    assert main([*words, "--dry-run", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["space"] == "core" and data["modules"] == 5 and data["weights"] == ["one: 1", "two: 1"]
    assert not (tmp_path / "out").exists()


def test_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "math", "code"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
        model.save_pretrained(tmp_path / name)
    base, *tuned = (str(tmp_path / name) for name in ("base", "math", "code"))
    words = ["combine", *tuned, "--base", base, "-o", str(tmp_path / "out"), "--weights", "0.5,0.5", "--json"]
    assert main([*words, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "linear" and not (tmp_path / "out").exists()
    assert main(words) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["updates"]) == 16 and (tmp_path / "out" / "model.safetensors").exists()


def test_mistakes(pair: list[str], tmp_path: Path, mistake: Mistake) -> None:
    out = str(tmp_path / "out")
    assert "--out" in mistake(["combine", *pair])
    assert "--analyze" in mistake(["combine", *pair, "--analyze", "--rank", "3"])
    assert "--per-module" in mistake(["combine", *pair, "-o", out, "--per-module", "a=x"])
    assert "density" in mistake(["combine", *pair, "-o", out, "--method", "ties"])
    assert "weights" in mistake(["combine", *pair, "-o", out, "--weights", "1"])
    assert "rank" in mistake(["combine", *pair, "-o", out, "--base", pair[0], "--rank", "3"])
    assert "nothing here" in mistake(["combine", str(tmp_path / "nothing here"), "-o", out])
