"""The rules of the house are noticed when they are broken."""

from __future__ import annotations

from pathlib import Path

import pytest

import check_house


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty source folder that is checked in place of ours."""
    monkeypatch.setattr(check_house, "SOURCE", tmp_path)
    return tmp_path / "peft_zoo"


def check(path: Path, text: str) -> list[str]:
    """The complaints about one file with this text, without its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return [line.removeprefix(str(path)) for line in check_house.complaints(path)]


@pytest.mark.parametrize(
    ("room", "line", "target"),
    [
        ("kernels/a.py", "from peft_zoo.adapters.base import ZooLayer", "adapters"),
        ("kernels/a.py", "from ..adapters import base", "adapters"),
        ("kernels/a.py", "import peft_zoo.registration", "registration"),
        ("adapters/a.py", "from peft_zoo import merge", "merge"),
        ("adapters/base/a.py", "from ...tasks import language", "tasks"),
        ("adapters/a.py", "def f():\n    from peft_zoo import methods", "methods"),
    ],
)
def test_an_import_of_a_higher_floor_is_named(source: Path, room: str, line: str, target: str) -> None:
    (complaint,) = check(source / room, line)
    assert complaint.endswith(f"imports the higher floor {target}")


def test_a_method_that_imports_another_is_named(source: Path) -> None:
    (complaint,) = check(source / "adapters/a.py", "from peft_zoo.adapters.b import B")
    assert complaint == ":1: adapters.a imports its sibling adapters.b.B; share through base"
    (complaint,) = check(source / "tasks/vision/data.py", "import os\nfrom ..language import data")
    assert complaint == ":2: tasks.vision.data imports its sibling tasks.language.data; share through base"


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("adapters/a.py", "from peft_zoo.adapters.base import ZooLayer"),
        ("adapters/a.py", "from .base.layer import ZooLayer"),
        ("adapters/a.py", "from peft_zoo.kernels.a import a"),
        ("adapters/a.py", "from .a_mask import mask"),
        ("tasks/vision/__init__.py", "from .data import load"),
        ("tasks/vision/data.py", "from . import model"),
        ("cli.py", "from peft_zoo import methods"),
        ("__init__.py", "from peft_zoo.tasks import load_task"),
    ],
)
def test_what_the_rules_allow_passes(source: Path, room: str, line: str) -> None:
    assert check(source / room, line) == []


def test_long_files_are_named(source: Path) -> None:
    assert check(source / "adapters/a.py", "\n" * 300) == check(source / "kernels/a.py", "\n" * 400) == []
    assert check(source / "adapters/a.py", "\n" * 301) == [": 301 lines, 300 allowed"]
    assert check(source / "adapters/base/a.py", "\n" * 401) == [": 401 lines, 400 allowed"]


def test_a_new_room_needs_a_floor(source: Path) -> None:
    assert check(source / "attic/a.py", "") == [": attic has no floor; give it one in check_house.py"]
