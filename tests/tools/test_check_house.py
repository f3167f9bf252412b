"""`tools/check_house.py` reports a breach of every rule of the house, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

import check_house


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package that is checked instead of `src/peft_zoo`."""
    monkeypatch.setattr(check_house, "SOURCE", tmp_path)
    return tmp_path / "peft_zoo"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def check(path: Path, text: str) -> list[str]:
    """The complaints about one file with this text, without its path."""
    return [line.removeprefix(str(path)) for line in check_house.complaints(write(path, text))]


@pytest.mark.parametrize(
    ("file", "line", "target"),
    [
        ("common/a.py", "from peft_zoo.kernels import merge_lora", "kernels"),
        ("kernels/lora/a.py", "from peft_zoo.adapters.base import ZooLayer", "adapters"),
        ("kernels/lora/a.py", "from ...calibration import moments", "calibration"),
        ("adapters/a/layer.py", "from peft_zoo import merge", "merge"),
        ("adapters/base/a.py", "from ...tasks import language", "tasks"),
        ("adapters/a/layer.py", "def f():\n    from peft_zoo import methods", "methods"),
        ("tasks/vision/data.py", "import peft_zoo.cli.main", "cli"),
    ],
)
def test_an_import_of_a_higher_floor_is_reported(source: Path, file: str, line: str, target: str) -> None:
    (complaint,) = check(source / file, line)
    assert complaint.endswith(f"imports the higher floor {target}")


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("kernels/lora/a.py", "from peft_zoo.io import safetensors", "kernels imports io, a room of the same floor"),
        ("merge/a.py", "from peft_zoo.tasks import base", "merge imports tasks, a room of the same floor"),
        (
            "adapters/a/layer.py",
            "from peft_zoo.adapters.b import B",
            "adapters.a.layer imports its sibling adapters.b.B",
        ),
        (
            "tasks/vision/data.py",
            "from ..language import data",
            "tasks.vision.data imports its sibling tasks.language.data",
        ),
        ("merge/nm/a.py", "from peft_zoo.merge.squeeze import api", "merge.nm.a imports its sibling merge.squeeze.api"),
    ],
)
def test_rooms_of_a_floor_and_families_do_not_import_each_other(
    source: Path, file: str, line: str, complaint: str
) -> None:
    (found,) = check(source / file, line)
    assert found.startswith(f":1: {complaint}")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("common/a.py", "from peft_zoo.common.checks import require"),
        ("kernels/snell/a.py", "from peft_zoo.kernels.sparse import mask"),
        ("adapters/a/layer.py", "from peft_zoo.adapters.base import ZooLayer"),
        ("adapters/a/layer.py", "from ..base.layer import ZooLayer"),
        ("adapters/a/layer.py", "from peft_zoo.kernels.lora.merge import merge_lora"),
        ("adapters/a/layer.py", "from .config import Config"),
        ("adapters/base/a.py", "from peft.tuners.tuners_utils import _private"),
        ("peft_patches.py", "import peft.utils._private"),
        ("tasks/vision/__init__.py", "from .data import load"),
        ("tasks/vision/data.py", "from . import model"),
        ("cli/main.py", "from peft_zoo.merge import squeeze_model"),
        ("snell.py", "from peft_zoo.adapters.snell import SnellConfig"),
        ("__init__.py", "from peft_zoo.tasks import load_task"),
    ],
)
def test_allowed_imports_pass(source: Path, file: str, line: str) -> None:
    assert check(source / file, line) == []


@pytest.mark.parametrize("line", ["from peft.utils import _private", "import torch._dynamo", "from a._b.c import D"])
def test_private_names_of_other_packages_are_reported(source: Path, line: str) -> None:
    (complaint,) = check(source / "adapters/a/layer.py", line)
    assert "is private to another package" in complaint
    assert check(source / "adapters/a/layer.py", "from __future__ import annotations") == []


def test_long_files_are_reported(source: Path) -> None:
    assert check(source / "adapters/a.py", "\n" * 300) == check(source / "kernels/a.py", "\n" * 400) == []
    assert check(source / "adapters/a.py", "\n" * 301) == [": 301 lines, 300 allowed"]
    assert check(source / "adapters/base/a.py", "\n" * 401) == [": 401 lines, 400 allowed"]


def test_functions_with_many_parameters_are_reported_but_not_kernels_and_operators(source: Path) -> None:
    wide = f"def f({', '.join('abcdefghijkl')}): ..."
    (complaint,) = check(source / "kernels/lora/a.py", wide)
    assert complaint == ":1: f has 12 parameters, 10 allowed"
    assert check(source / "kernels/lora/a_triton.py", wide) == []
    assert check(source / "kernels/lora/a.py", f"@operator\n{wide}") == []
    assert check(source / "kernels/lora/a.py", wide.replace("f(", "f_reference(")) == []


def test_a_new_room_needs_a_floor(source: Path) -> None:
    assert check(source / "attic/a.py", "") == [": attic has no floor; give it one in check_house.py"]


@pytest.mark.parametrize(
    ("names", "reported"),
    [
        (["snell.py", "snell_layer.py"], ["snell_layer.py"]),
        (["snell/__init__.py", "snell_layer.py"], ["snell_layer.py"]),
        (["merge.py", "merge_triton.py", "merging.py"], []),
    ],
)
def test_prefix_families_are_reported(tmp_path: Path, names: list[str], reported: list[str]) -> None:
    for name in names:
        write(tmp_path / name, "")
    found = [Path(line.partition(":")[0]).name for line in check_house.prefix_families(tmp_path)]
    assert found == reported


def test_kernel_families_in_a_circle_are_reported(source: Path) -> None:
    room = source / "kernels"
    write(room / "__init__.py", "from peft_zoo.kernels.snell import weight")
    write(room / "base/operator.py", "import torch")
    write(room / "sparse/mask.py", "from peft_zoo.kernels.base import operator")
    write(room / "snell/weight.py", "from peft_zoo.kernels.sparse.mask import mask")
    write(room / "snell/linear.py", "from .weight import merge")
    assert list(check_house.circles(room)) == []
    write(room / "sparse/mask_triton.py", "def f():\n    from ..snell import weight")
    (complaint,) = check_house.circles(room)
    assert "snell" in complaint and "sparse" in complaint
