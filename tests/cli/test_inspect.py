"""`peft-zoo inspect` names what a folder holds and every fault of it, and makes no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_zoo import CachedLoraConfig, SnellConfig
from peft_zoo.cli.main import main

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def saved(folder: Path, config: Any) -> Path:
    """Saves an adapter of a tiny model."""
    torch.manual_seed(0)
    get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).save_pretrained(folder)
    return folder


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Exit status and values of the command."""
    status = main(["inspect", str(path), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_good_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = inspected(saved(tmp_path, SnellConfig(r=2, target_modules=["0"])), capsys)
    assert (status, found["problems"]) == (0, [])
    assert found["holds"] == "an adapter of type ZOO_SNELL"
    assert (found["r"], found["modules"], found["target_modules"]) == (2, 1, ["0"])
    assert found["bytes"] == sum(t.nbytes for t in load_file(tmp_path / WEIGHTS).values())


def test_every_fault_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, SnellConfig(r=2, target_modules=["0"]))
    fields = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**fields, "target_modules": "(a+)+", "r": 10**6, "later": 1}))
    tensors = load_file(tmp_path / WEIGHTS)
    next(t for t in tensors.values() if t.is_floating_point()).view(-1)[0] = torch.nan
    save_file(tensors, tmp_path / WEIGHTS)
    status, found = inspected(tmp_path, capsys)
    assert status == 1
    for name in ("target_modules", "r=1000000", "later", "finite"):
        assert any(name in problem for problem in found["problems"]), name
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    assert any("weights_sha256" in problem for problem in inspected(tmp_path, capsys)[1]["problems"])


@pytest.mark.parametrize("content", ["", "[1]", "{'a'", '{"peft_type": ["LORA"]}', '{"peft_type": "LATER", "r": NaN}'])
def test_a_configuration_that_is_none(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, LoraConfig(r=2, target_modules=["0"]))
    (tmp_path / CONFIG).write_text(content)
    status, found = inspected(tmp_path, capsys)
    assert status == 1 and found["problems"] and found["tensors"] == 2


def test_other_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    down, up = torch.rand(2, 8), torch.rand(8, 2)
    file = tmp_path / "kohya.safetensors"
    save_file({"lora_unet_a.lora_down.weight": down, "lora_unet_a.lora_up.weight": up}, file)
    status, found = inspected(file, capsys)
    assert (status, found["holds"], found["ranks"]) == (0, "a LoRA in the format kohya", "2 to 2")
    CachedLoraConfig(adapters={"a": "x", "b": "y"}).save_pretrained(str(tmp_path / "recipe"))
    status, found = inspected(tmp_path / "recipe", capsys)
    assert (status, found["holds"].partition(" of")[0]) == (0, "a recipe")
    assert main(["inspect", str(tmp_path / "nothing")]) != 0
