"""Folders and files appear complete or not at all, wherever the writer is stopped."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_zoo.common import atomic
from peft_zoo.common.atomic import new_file, new_folder, replaced_folder
from peft_zoo.io import TensorFile, TensorInfo, TensorWriter, tensor_writer

TENSOR = torch.arange(6.0).reshape(2, 3)


def write_text(path: Path) -> None:
    with new_file(path) as draft:
        draft.write_text("card")


def save_folder(target: Path) -> None:
    with new_folder(target) as folder:
        save_tensors(folder / "adapter_model.safetensors")
        (folder / "more").mkdir()
        (folder / "more" / "README.md").write_text("card")
        (folder / "adapter_config.json").write_text("{}")


def save_tensors(target: Path) -> None:
    with TensorWriter(target, {"a": TensorInfo.of(TENSOR)}) as writer:
        writer.write("a", TENSOR)


def content(path: Path) -> dict[str, bytes]:
    """Every file at or below a path, hidden ones too."""
    return {str(found.relative_to(path)): found.read_bytes() for found in [path, *path.rglob("*")] if found.is_file()}


def test_what_was_written_is_there_and_nothing_else(tmp_path: Path) -> None:
    save_folder(tmp_path / "new" / "out")
    save_tensors(tmp_path / "new" / "out.safetensors")
    assert set(content(tmp_path)) == {
        "new/out/adapter_config.json",
        "new/out/adapter_model.safetensors",
        "new/out/more/README.md",
        "new/out.safetensors",
    }
    for path in (tmp_path / "new/out.safetensors", tmp_path / "new/out/adapter_model.safetensors"):
        with TensorFile(path) as file:
            assert torch.equal(file.read("a"), TENSOR)


def test_of_two_writers_one_wins_whole(tmp_path: Path) -> None:
    """Both have seen that there is no target; the one that ends last says so."""
    for save, new, field in ((save_folder, new_folder, "out_dir="), (write_text, new_file, "out_dir=")):
        target = tmp_path / save.__name__
        with pytest.raises(ValueError, match=field), new(target) as draft:
            save(target)
            first = content(target)
            (draft / "mine" if draft.is_dir() else draft).write_text("mine")
        assert content(target) == first
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failure_leaves_no_new_folders(tmp_path: Path) -> None:
    for new in (new_folder, new_file):
        with pytest.raises(KeyError), new(tmp_path / "a" / "b" / "out"):
            raise KeyError
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("looks", [1, 2])
def test_of_two_that_replace_a_folder_one_wins_whole(
    looks: int, exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one says so, also if it is overtaken between its last look at the folder and the exchange."""
    target, look = tmp_path / "out", atomic._identity

    def save(text: str) -> None:
        with replaced_folder(target, "folder") as work:
            (work / "name").unlink(missing_ok=True)
            (work / "name").write_text(text)

    def overtaken(path: Path) -> Any:
        nonlocal looks
        found, looks = look(path), looks - 1
        if looks == 0:
            save("first")
        return found

    if exists:
        save("old")
    monkeypatch.setattr(atomic, "_identity", overtaken)
    with pytest.raises(ValueError, match=r"folder='.*another process"):
        save("second")
    assert (target / "name").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_permissions_are_ordinary(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_folder(tmp_path / "out")
        save_tensors(tmp_path / "out.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out/adapter_model.safetensors").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "out.safetensors").stat().st_mode & 0o777 == 0o640


def test_an_empty_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    save_folder(Path("out"))
    assert len(content(tmp_path / "out")) == 3


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling"])
def test_what_exists_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
        (target / "mine").write_text("mine")
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path if kind == "link" else tmp_path / "nowhere")
    before = content(tmp_path)
    for save, field in ((save_folder, "out_dir="), (save_tensors, "path="), (write_text, "out_dir=")):
        with pytest.raises(ValueError, match=field):
            save(target)
    with pytest.raises(ValueError, match="twin="), new_folder(target, field="twin"):
        pytest.fail("the block ran")
    assert content(tmp_path) == before
    assert [found.name for found in tmp_path.iterdir()] == ["out"]


class Killed(BaseException):
    """Ends a process on the spot."""


class Countdown:
    """A function that raises in one call, counted from 0."""

    def __init__(self, function: Callable[..., Any], number: int, error: BaseException) -> None:
        self.function, self.left, self.error = function, number, error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == -1:
            raise self.error
        return self.function(*args, **kwargs)


class FailingFile(io.FileIO):
    """Writes half of the bytes in the call in which it raises, as a disk does that is full."""

    def __init__(self, path: Path, mode: str, number: int, error: BaseException) -> None:
        super().__init__(path, mode)
        self.whole = Countdown(super().write, number, error)

    def write(self, data: Any) -> int:
        try:
            return self.whole(data)
        except (Killed, OSError):
            super().write(bytes(data)[: len(bytes(data)) // 2])
            raise


@pytest.mark.parametrize("save", [save_folder, save_tensors])
@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "disk full")], ids=["killed", "full"])
@pytest.mark.parametrize(
    ("step", "counts"), [("fsync", (8, 2)), ("open", (8, 2)), ("replace", (1, 0)), ("link", (1, 1)), ("write", (2, 2))]
)
def test_failing_at_any_step_leaves_nothing_or_all(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save: Callable[[Path], None],
    error: BaseException,
    step: str,
    counts: tuple[int, int],
) -> None:
    steps = counts[save is save_tensors]
    save(tmp_path / "complete")
    complete = content(tmp_path / "complete")
    for number in range(steps + 1):
        target = tmp_path / str(number) / "out"
        (target if save is save_folder else target.parent).mkdir(parents=True)
        with monkeypatch.context() as patch:
            if isinstance(error, Killed):  # a killed process does not clean up
                patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
                patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
            if step == "write":
                patch.setattr(tensor_writer, "open", partial(FailingFile, number=number, error=error), raising=False)
            else:
                patch.setattr(os, step, Countdown(getattr(os, step), number, error))
            with pytest.raises(type(error)) if number < steps else nullcontext():
                save(target)
        is_renamed = number == steps or (step in ("fsync", "open") and number == steps - 1)
        assert content(target) == (complete if is_renamed else {})
        if not isinstance(error, Killed):
            assert {found.name for found in target.parent.iterdir()} <= {"out"}
