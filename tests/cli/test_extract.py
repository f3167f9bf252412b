"""`peft-zoo extract`, in process: what it writes is what the library writes, and mistakes cost one sentence."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from peft_zoo.cli.extract import OWN, Flags
from peft_zoo.cli.main import main
from peft_zoo.merge import extract_lora
from peft_zoo.merge.extract.options import ExtractOptions
from tests.cli.conftest import Mistake

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("saved")
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16))
    model.save_pretrained(folder / "base")
    model.transformer.h[0].attn.c_attn.weight.data += torch.randn(32, 2) @ torch.randn(2, 96)
    model.save_pretrained(folder / "tuned")
    return [str(folder / "base"), str(folder / "tuned")]


def test_every_option_of_the_library_is_a_flag() -> None:
    assert {item.name for item in fields(Flags)} - set(OWN) == {item.name for item in fields(ExtractOptions)}


def test_it_writes_what_the_library_writes(pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = extract_lora(*pair, tmp_path / "a", rank=1)
    assert main(["extract", *pair, "-o", str(tmp_path / "b"), "--rank", "1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    assert data == {**report.to_dict(), "written": str(tmp_path / "b")}
    assert main(["extract", *pair, "-o", str(tmp_path / "c"), "--rank", "auto"]) == 0
    assert "1 modules, error 0.0000" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", *pair, "-o", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["modules"] == 1 and data["ranks"] == "rank=auto" and not (tmp_path / "out").exists()


def test_mistakes(pair: list[str], tmp_path: Path, mistake: Mistake) -> None:
    out = str(tmp_path / "out")
    assert "--out" in mistake(["extract", *pair])
    assert "nothing differs" in mistake(["extract", pair[0], pair[0], "-o", out])
    assert "rank, energy" in mistake(["extract", *pair, "-o", out, "--rank", "2", "--energy", "0.5"])
