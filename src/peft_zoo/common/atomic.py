"""Files and folders that appear whole or not at all.

What is written gets a hidden name beside the final one; only when every byte is on disk does one rename put it in its
place, and the rename is made durable too. A process that is killed leaves at most something named `.unfinished-…`.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: str | Path, field: str = "out_dir") -> Iterator[Path]:
    """Gives a temporary folder that takes the place of `target` when the block ends, complete and on disk.

    If the block raises, or the process is killed at any moment, `target` is what it was before.

    Args:
        target: A folder that does not exist or is empty.
        field: The caller's name for `target`, for the error message.

    Raises:
        ValueError: If there is something at `target`.
    """
    target = Path(os.path.abspath(target))
    check_new_folder(target, field)
    work = _beside(target)
    work.mkdir()
    try:
        yield work
        for folder, _, files in os.walk(work, topdown=False):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)  # is there only if something failed
    _sync(target.parent)


def check_new_folder(target: Path, field: str = "out_dir") -> None:
    """What `new_folder` asks of its target, for work that takes long before the folder is made.

    Raises:
        ValueError: If there is something at `target`.
    """
    is_empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    if os.path.lexists(target) and not is_empty:
        raise ValueError(f"{field}={str(target)!r} exists and is not an empty folder; give a new one.")


@contextmanager
def new_file(target: str | Path, field: str = "out_dir", *, private: bool = False) -> Iterator[Path]:
    """Gives the path of a temporary file, to be made in the block, that takes the place of `target` when it ends.

    Args:
        target: A path where there is nothing.
        field: The caller's name for `target`, for the error message.
        private: As in `replaced_file`.

    Raises:
        ValueError: If there is something at `target`.
    """
    if os.path.lexists(target):
        raise ValueError(f"{field}={str(target)!r} exists; give a new name.")
    with replaced_file(target, private=private) as work:
        yield work


@contextmanager
def replaced_file(target: str | Path, *, private: bool = False) -> Iterator[Path]:
    """Yields a temporary path; the file written there replaces `target`, or creates it, when the block ends.

    Args:
        target: Path of a file; it may exist.
        private: Whether only the owner may read the file: mode 0600, set before anything is written. Default False.
    """
    target = Path(os.path.abspath(target))
    work = _beside(target)
    try:
        if private:
            work.touch(mode=0o600, exist_ok=False)
        yield work
        _sync(work)
        os.replace(work, target)
    finally:
        work.unlink(missing_ok=True)
    _sync(target.parent)


def _beside(target: Path) -> Path:
    """A new name in the folder of `target`, which is made if need be. Not `tempfile`: that makes things private."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".unfinished-{secrets.token_hex(8)}")


def _sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such thing
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
