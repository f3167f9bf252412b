"""Opens, copies and lists the files of untrusted folders: every file is a regular one of the folder itself.

A named pipe blocks a reader for ever, a device never ends, and a link out of the folder makes a tool that copies
folders publish a private file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

MAX_ENTRIES = 100_000
"""Limit on the files and folders of one folder."""


_PIECE = 1 << 22  # bytes copied at a time


def open_regular(path: str | os.PathLike[str], inside: str | os.PathLike[str] | None = None) -> FileIO:
    """Opens a regular file for reading, unbuffered; never blocks.

    Args:
        path: Path of the file.
        inside: Folder that links may not leave; None if the user named the file itself.

    Raises:
        ValueError: If there is no file, it is a folder, named pipe, socket or device, or a link leaves `inside`.
    """
    path = Path(path)
    if inside is not None:
        check_regular(path, Path(inside))
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: not a file ({reason}); give an existing one.") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path}: not a file but a folder, named pipe or device; give a file.")
    return FileIO(handle, "rb")


def copy_regular(
    source: str | os.PathLike[str], target: str | os.PathLike[str], inside: str | os.PathLike[str]
) -> None:
    """Copies the bytes of a regular file whose links do not leave the folder `inside` to a new file."""
    with open_regular(source, inside) as file, open(target, "xb") as copy:
        while piece := file.read(_PIECE):
            copy.write(piece)


def check_regular(path: Path, folder: Path) -> None:
    """Raises a ValueError that names `path` unless it is a regular file in `folder`.

    Links must lead to a file of the folder, or of the same repository in the cache of huggingface_hub, whose snapshots
    are links.
    """
    try:
        mode = os.stat(path).st_mode  # follows links, and opens nothing: opening a named pipe would block
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: not a file ({reason}); give an existing one.") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: not a regular file; remove it.")
    real = path.resolve()
    if not any(real.is_relative_to(root) for root in _roots(folder)):
        raise ValueError(f"{path}: a link that leaves the folder; put the file itself there.")


def regular_files(folder: Path) -> Iterator[Path]:
    """Yields the paths of all files in a folder and its subfolders, relative to it and in order.

    Hidden subfolders are skipped. Raises a ValueError for a named pipe, a device, and a link that leaves the folder.
    """
    count = 0
    for place, folders, names in os.walk(folder):  # does not follow links to folders
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        count += len(folders) + len(names)
        if count > MAX_ENTRIES:
            raise ValueError(f"{folder}: has more than {MAX_ENTRIES} entries; give the folder of one model.")
        linked = [name for name in folders if Path(place, name).is_symlink()]
        for name in sorted([*names, *linked]):
            check_regular(Path(place, name), folder)
            yield Path(place, name).relative_to(folder)


def _roots(folder: Path) -> Iterator[Path]:
    """Yields the folders in which the files of `folder` may lie."""
    root = folder.resolve()
    yield root
    for place in (root, *root.parents):
        if place.parent.name == "snapshots":  # <cache>/models--owner--name/snapshots/<commit>/<subfolder>
            yield place.parent.parent / "blobs"
            return
