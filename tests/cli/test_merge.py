"""`peft-zoo merge`: words, results and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from peft_zoo.cli.main import main
from peft_zoo.merge import merge_checkpoint
from tests.cli.conftest import Mistake


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and two adapters."""
    root = tmp_path_factory.mktemp("merge")
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(root / "base")
    for name in ("one", "other"):
        lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        get_peft_model(GPT2LMHeadModel.from_pretrained(root / "base"), lora).save_pretrained(root / name)
    return root


def test_it_writes_what_the_function_writes(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folders)
    assert main(["merge", "base", "one", "other", "-o", str(tmp_path / "out"), "--weight", "one=0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    merge_checkpoint("base", {"one": 0.5, "other": 1.0}, tmp_path / "wanted")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "wanted/model.safetensors").read_bytes()
    assert [row["adapters"] for row in found["tensors"]] == [["one", "other"]] and found["copied"] == 15
    assert main(["merge", "base", "one", "--output", str(tmp_path / "plain")]) == 0
    text = capsys.readouterr().out
    assert "c_attn" in text and str(tmp_path / "plain") in text


def test_a_dry_run_writes_nothing(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folders)
    assert main(["merge", "base", "one", "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "c_attn" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("base -o out", "ADAPTER"),
        ("base one", "--output"),
        ("base one -o out --weight one", "--weight"),
        ("base one -o out --weight one=x", "--weight"),
        ("base one -o out --weight two=1", "two"),
        ("base one -o out --dtype int8", "--dtype"),
        ("base one -o base", "out="),
        ("none one -o out", "none"),
        ("base none -o out", "none"),
        ("one one -o out", "one"),
        ("base base -o out", "base"),
    ],
)
def test_mistakes(words: str, named: str, folders: Path, monkeypatch: pytest.MonkeyPatch, mistake: Mistake) -> None:
    monkeypatch.chdir(folders)
    given: list[Any] = words.split()
    assert named in mistake(["merge", *given])
    assert not (folders / "out").exists()
