"""Walks untrusted folders: every file is a regular one of the folder itself."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

MAX_ENTRIES = 100_000
"""Limit on the files and folders of one folder."""


def check_regular(path: Path, folder: Path) -> None:
    """Raises a ValueError that names `path` unless it is a regular file in `folder`.

    Links must lead to a file of the folder, or of the same repository in the cache of huggingface_hub, whose snapshots
    are links.
    """
    try:
        mode = os.stat(path).st_mode  # follows links, and opens nothing: opening a named pipe would block
    except OSError as error:
        raise ValueError(f"{path}: not a file ({error.strerror}); give an existing one.") from error
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
    if root.parent.name == "snapshots":  # <cache>/models--owner--name/snapshots/<commit>
        yield root.parent.parent / "blobs"
