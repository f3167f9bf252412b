"""Atomic writes: a file or folder appears complete and on disk, or not at all.

Everything is written under a hidden temporary name in the target's folder, flushed to disk and renamed once; the rename
is flushed too. A killed process leaves at most an `.unfinished-…` entry.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def new_folder(target: str | os.PathLike[str], field: str = "out_dir") -> Iterator[Path]:
    """Yields a temporary folder that is flushed to disk and renamed to `target` when the block ends.

    If the block raises or the process is killed, `target` stays as it was. If it exists and is no empty folder, a
    ValueError names the caller's argument `field`.
    """
    target = Path(os.path.abspath(target))
    check_new_folder(target, field)
    made = _missing_parents(target)
    work = _unfinished_path(target)
    try:
        work.mkdir()
        yield work
        for folder, _, files in os.walk(work, topdown=False):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        try:
            os.replace(work, target)  # replaces only an empty folder
        except OSError:
            check_new_folder(target, field)  # another process may have been faster
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)  # still exists only after a failure
        _remove_empty(made)
    _sync(target.parent)


def check_new_folder(target: Path, field: str = "out_dir") -> None:
    """Raises a ValueError unless `new_folder` would accept `target`; call it before work that takes long."""
    is_empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    if os.path.lexists(target) and not is_empty:
        raise ValueError(f"{field}={str(target)!r} exists and is not an empty folder; give a new one.")


@contextmanager
def new_file(target: str | os.PathLike[str], field: str = "out_dir", *, private: bool = False) -> Iterator[Path]:
    """Yields a temporary path; the file created there is flushed to disk and renamed to `target` when the block ends.

    If `target` exists, a ValueError names the caller's argument `field`. `private` is that of `replaced_file`.
    """
    if os.path.lexists(target):
        raise ValueError(f"{field}={str(target)!r} exists; give a new name.")
    with replaced_file(target, private=private, field=field) as work:
        yield work


@contextmanager
def replaced_file(target: str | os.PathLike[str], *, private: bool = False, field: str | None = None) -> Iterator[Path]:
    """Yields a temporary path; the file written there replaces `target`, or creates it, when the block ends.

    `private=True` gives it mode 0600 before anything is written. With the name of a caller's argument as `field`, a
    file that another process has written in the meantime is not replaced: a ValueError names the argument.
    """
    target = Path(os.path.abspath(target))
    made = _missing_parents(target)
    work = _unfinished_path(target)
    try:
        if private:
            work.touch(mode=0o600, exist_ok=False)
        yield work
        _sync(work)
        if field is None or not _linked(work, target, field):
            os.replace(work, target)
    finally:
        work.unlink(missing_ok=True)
        _remove_empty(made)
    _sync(target.parent)


def _linked(work: Path, target: Path, field: str) -> bool:
    """Gives a file the name `target` unless that exists; returns False where the file system has no hard links."""
    try:
        os.link(work, target)
    except FileExistsError as error:
        raise ValueError(f"{field}={str(target)!r} exists; give a new name.") from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    os.unlink(work)
    return True


def _missing_parents(target: Path) -> list[Path]:
    """Returns the folders above `target` that do not exist, the innermost first."""
    return [folder for folder in target.parents if not os.path.lexists(folder)]


def _remove_empty(folders: list[Path]) -> None:
    """Removes folders that were created for a target that did not come to be."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # it has the target, or the work of another process
            return


def _unfinished_path(target: Path) -> Path:
    """Unused hidden path in `target`'s folder, which is created. `tempfile` would create a private file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".unfinished-{secrets.token_hex(8)}")


def _sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot flush folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
