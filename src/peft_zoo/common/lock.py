"""Locks between processes of one machine; a killed process holds none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path


@contextmanager
def only_process(path: Path, busy: str) -> Iterator[None]:
    """Runs the block while no other process is in it with the same `path`, a file that is created and stays.

    Systems without `fcntl` (Windows) have no lock.

    Raises:
        ValueError: With the text `busy` if another process is in the block.
    """
    fcntl = import_module("fcntl") if find_spec("fcntl") else None
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"{busy}.") from error
        yield
    finally:
        os.close(handle)  # releases the lock
