"""`peft-zoo export`, in process: what it writes is what the library writes, and mistakes cost one sentence."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors.torch import load_file

from peft_zoo.cli.export import OWN, Flags
from peft_zoo.cli.main import main
from peft_zoo.merge import export_lora
from peft_zoo.merge.export.options import ExportOptions
from tests.cli.conftest import Mistake
from tests.merge.export import adapters

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def snell(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("saved") / "snell"
    adapters.saved("ZOO_SNELL", folder)
    return str(folder)


def test_every_option_of_the_library_is_a_flag() -> None:
    names = {item.name for item in fields(Flags)} - set(OWN) - {"base"}
    assert names == {item.name for item in fields(ExportOptions)} - {"per_layer", "verify", "moments"}


def test_it_writes_what_the_library_writes(snell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = export_lora(snell, tmp_path / "a", max_error=0.3, per_layer=False, drop=["b"], verify=False)
    words = ["export", snell, "-o", str(tmp_path / "b"), "--max-error", "0.3", "--shared-error", "--drop", "b"]
    assert main([*words, "--no-verify", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
    assert data == {**report.to_dict(), "written": str(tmp_path / "b")} and data["dropped"] == ["b"]
    assert main(["export", snell, "--out", str(tmp_path / "c"), "--rank", "4", "--no-verify"]) == 0
    shown = capsys.readouterr().out
    assert "ZOO_SNELL, error 0." in shown and str(tmp_path / "c") in shown


def test_a_dry_run_writes_nothing(snell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", snell, "-o", str(tmp_path / "out"), "--rank", "4", "--dry-run", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["type"] == "ZOO_SNELL" and data["modules"] == 2 and data["exact"] is False
    assert not (tmp_path / "out").exists()


def test_mistakes(snell: str, tmp_path: Path, mistake: Mistake) -> None:
    out = str(tmp_path / "out")
    assert "--out" in mistake(["export", snell])
    assert "errors at r=8/16/32/64" in mistake(["export", snell, "-o", out])
    assert "--max-error" in mistake(["export", snell, "-o", out, "--rank", "4", "--shared-error"])
    assert "out" in mistake(["export", snell, "-o", snell, "--rank", "4"])
    assert "config.json" in mistake(["export", snell, "-o", out, "--rank", "4", "--base", str(tmp_path)])
    assert "adapter_config.json" in mistake(["export", str(tmp_path), "-o", out, "--rank", "4"])
