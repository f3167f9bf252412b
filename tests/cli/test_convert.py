"""`peft-zoo convert`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_zoo.cli.main import main
from tests.merge.formats.models import assert_equal, save_lora


def test_convert_to_kohya_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = save_lora(tmp_path / "peft", {"conv_in": (8, 4, 3, 3)})
    file, back = str(tmp_path / "k.safetensors"), str(tmp_path / "back")
    arguments = ["convert", str(adapter), "-o", file, "--to", "kohya", "--family", "sd", "--part", "unet"]
    assert main([*arguments, "--dry-run"]) == 0
    assert not Path(file).exists()
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["modules"] == {"": 1}
    assert main(["convert", file, "-o", back, "--family", "sd"]) == 0
    assert_equal(adapter, Path(back))


def test_a_mistake_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = save_lora(tmp_path / "peft", {"conv_in": (8, 4, 3, 3)})
    assert main(["convert", str(adapter), "-o", str(tmp_path / "k.safetensors"), "--to", "kohya"]) != 0
    error = capsys.readouterr().err
    assert "family=None" in error and len(error.splitlines()) == 1
