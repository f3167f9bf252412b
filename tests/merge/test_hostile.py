"""Tools that convert adapter files refuse what is hostile or broken in a sentence, and write nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_zoo import LqLoraConfig, RandLoraConfig
from peft_zoo.cli.main import main
from peft_zoo.merge import export_lora
from peft_zoo.merge.randlora import from_peft, to_peft
from peft_zoo.merge.squeeze.api import rank_report, squeeze_adapter
from peft_zoo.snell import import_snell_checkpoint
from tests.adapters.lq_lora.samples import without_checksum_of_the_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BOMB = r"(([a-z0-9_]+)+\.?)+!"
TOOLS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "squeeze": (LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=False), squeeze_adapter),
    "export": (LqLoraConfig(r=4, target_modules=["q", "v"], keep_init=True), partial(export_lora, verify=False)),
    "export layers": (
        peft.LoHaConfig(r=4, target_modules=["q", "v"], init_weights=False),
        partial(export_lora, verify=False),
    ),
    "to_peft": (RandLoraConfig(r=4, target_modules=["q", "v"], init_weights=False), to_peft),
    "from_peft": (peft.RandLoraConfig(r=4, target_modules=["q", "v"], init_weights=False), from_peft),
}


def base() -> nn.Module:
    return nn.ModuleDict({"q": nn.Linear(64, 64), "v": nn.Linear(64, 64), "head": nn.Linear(64, 8)})


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    for name, (config, _) in TOOLS.items():
        torch.manual_seed(0)
        get_peft_model(base(), config).save_pretrained(str(folder / name))
    return folder


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
        without_checksum_of_the_file(folder)

    return apply


def spoil_first(value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    def apply(found: dict[str, torch.Tensor]) -> None:
        ends = ("q.lora_A.weight", "q.randlora_lambda", "lambda", "q.hada_w1_a")
        first = next(key for key in sorted(found) if key.endswith(ends))
        found[first].view(-1)[0] = value

    return apply


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def pipe(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


def link(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return apply


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "extra key": (tensors(lambda t: t.update({"base_model.model.head.weight": torch.zeros(8, 64)})), "head.weight"),
    "not finite": (tensors(spoil_first(float("nan"))), "q"),
    "pickle": (pickled, "adapter_model.bin"),
    "pipe": (pipe, CONFIG),
    "link of the weights": (link(WEIGHTS), WEIGHTS),
    "link of the configuration": (link(CONFIG), CONFIG),
    "deep": (lambda folder: (folder / CONFIG).write_text('{"a":' + "[" * 900 + "]" * 900 + "}"), "deep"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("tool", TOOLS)
def test_faults_are_named(tool: str, fault: str, good: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(good / tool, tmp_path / "in"))
    spoil, named = FAULTS[fault]
    spoil(source)
    options = {"rank": 2} if tool == "squeeze" else {}
    with pytest.raises(ValueError, match=named):
        TOOLS[tool][1](source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    if tool == "squeeze" and fault != "not finite":
        with pytest.raises(ValueError, match=named):
            rank_report(source)


@pytest.mark.parametrize("tool", TOOLS)
def test_expressions_of_a_file_are_neither_run_nor_written(tool: str, good: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(good / tool, tmp_path / "in"))
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps({**config, "target_modules": BOMB}))
    options = {"rank": 2} if tool == "squeeze" else {}
    TOOLS[tool][1](source, tmp_path / "out", **options)
    assert sorted(json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"]) == ["q", "v"]


def test_a_basis_far_larger_than_the_adapter_is_not_computed(good: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(good / "to_peft", tmp_path / "in"))
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps({**config, "basis_shape": [10**7, 64]}))
    with pytest.raises(ValueError, match="basis_shape"):
        to_peft(source, tmp_path / "out")


def test_the_command_prints_one_sentence(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, (spoil, named) in enumerate(FAULTS.values()):
        source = Path(shutil.copytree(good / "squeeze", tmp_path / f"{place}" / "in"))
        spoil(source)
        assert main(["squeeze", str(source), str(tmp_path / "out"), "--rank", "2"]) != 0
        printed = capsys.readouterr().err
        assert named in printed and "Traceback" not in printed and len(printed.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"In_Qs": torch.randn(2, 8, 3)}, "In_Qs"),
        ({"In_Qs": torch.randn(16, 4)}, "In_Qs"),
        ({"Out_Qs": torch.full((2, 8, 4), torch.inf)}, "Out_Qs"),
        ({"Out_Qs": torch.ones(2, 8, 4, dtype=torch.int8)}, "Out_Qs"),
        ({"alpha": torch.ones(3), "gamma": torch.ones(1), "beta": torch.ones(1)}, "alpha"),
    ],
)
def test_a_released_checkpoint_is_validated(change: dict[str, torch.Tensor], named: str) -> None:
    parts = {"In_Qs": torch.randn(2, 8, 4), "Out_Qs": torch.randn(2, 8, 4), **change}
    checkpoint = {f"blocks.0.attn.additional_q.learnable.{name}": value for name, value in parts.items()}
    with pytest.raises(ValueError, match=named):
        import_snell_checkpoint(checkpoint, sparsity=0.5)
