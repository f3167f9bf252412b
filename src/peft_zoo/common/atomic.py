"""Atomic writes: a file or folder appears complete and on disk, or not at all.

Everything is written under a hidden temporary name in the target's folder, flushed to disk and renamed once; the rename
is flushed too. A killed process leaves at most an `.unfinished-…` entry.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import sys
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
        _sync_tree(work)
        try:
            os.replace(work, target)  # replaces only an empty folder
        except OSError:
            check_new_folder(target, field)  # another process may have been faster
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)  # still exists only after a failure
        _remove_empty(made)
    _sync(target.parent)


@contextmanager
def replaced_folder(target: str | os.PathLike[str], field: str = "folder") -> Iterator[Path]:
    """Yields a temporary folder that replaces `target`, or creates it, when the block ends.

    The new folder starts with the entries of the old one, as hard links where the file system has them, so write new
    files instead of changing those. Linux and macOS exchange the folders at once; elsewhere a killed process can leave
    the old folder as `.unfinished-…`.

    Raises:
        ValueError: If `target` is no folder, or another process has replaced it in the meantime, whose folder then
            stays; it names the caller's argument `field`.
    """
    target = Path(os.path.abspath(target))
    if os.path.lexists(target) and not target.is_dir():
        raise ValueError(f"{field}={str(target)!r} is not a folder; give the name of one.")
    target = target.resolve()  # a link stays, the folder that it leads to is replaced
    work, before = _unfinished_path(target), _identity(target)
    try:
        if target.exists():
            shutil.copytree(target, work, symlinks=True, copy_function=link)
        else:
            work.mkdir()
        yield work
        _sync_tree(work)
        _exchange_if(before, work, target, field)
    finally:
        shutil.rmtree(work, ignore_errors=True)  # the old folder, or after a failure the new one
    _sync(target.parent)


def _identity(path: Path) -> tuple[int, int] | None:
    """Returns what tells a folder from another one of the same name; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _exchange_if(before: tuple[int, int] | None, work: Path, target: Path, field: str) -> None:
    """Gives `work` the name `target` unless that is not the folder `before` any more: then a ValueError is raised."""
    is_same = _identity(target) == before
    try:
        if is_same and before is None:
            os.replace(work, target)
        elif is_same:
            _exchange(work, target)
            if is_other := _identity(work) != before:  # it has been replaced since the last look
                _exchange(work, target)
            is_same = not is_other
    except OSError:
        if before is not None or _identity(target) is None:
            raise
        is_same = False  # it has been created since the last look
    if not is_same:
        raise ValueError(f"{field}={str(target)!r} was written by another process in the meantime; save again.")


def link(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Links a file, or copies it where the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(work: Path, target: Path) -> None:
    """Gives `work` the name `target`, and the folder of that name the name `work`."""
    if not _exchanged(work, target):
        old = _unfinished_path(target)
        os.replace(target, old)
        os.replace(work, target)
        os.replace(old, work)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two folders by one call of the operating system; returns False where there is no such call."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = library.renamex_np(os.fsencode(one), os.fsencode(other), 2)  # RENAME_SWAP
        else:
            failed = library.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2)  # RENAME_EXCHANGE
    except (AttributeError, OSError, TypeError):
        return False
    return failed == 0


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


def remove_folder(folder: Path) -> None:
    """Removes a folder, which loses its name before its first file: a killed process leaves no half of it there."""
    work = _unfinished_path(folder)
    os.replace(folder, work)
    shutil.rmtree(work)


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


def _sync_tree(folder: Path) -> None:
    """Flushes all files and folders in a folder to disk."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot flush folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
