"""Folders that are expensive to make and cheap to keep: built once, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from peft_zoo.common.values import SettingError


def cache_folder() -> Path:
    """Where rebuilt models live: `PEFT_ZOO_CACHE`, or `~/.cache/peft-zoo`."""
    return Path(os.environ.get("PEFT_ZOO_CACHE") or Path.home() / ".cache" / "peft-zoo")


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache, made by `build` if it is not there.

    `build` fills a temporary folder beside the final one, which then takes its place by one rename: a run that is
    killed leaves nothing half made, and of two processes that build at once the second finds the work done.

    Args:
        name: Name of the folder; a new version of its content needs a new name.
        build: Fills the empty folder it is given.

    Raises:
        SettingError: If the cache cannot be written.
    """
    final = cache_folder() / name
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=final.parent))
    except OSError as error:
        raise SettingError(
            f"PEFT_ZOO_CACHE={str(cache_folder())!r} cannot be written ({error.strerror}): "
            "set it to a folder you may write to."
        ) from error
    try:
        build(work)
        work.chmod(0o755)
        try:
            work.rename(final)
        except OSError:
            if not final.is_dir():  # nobody else was faster, so this is a real failure
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def package_file(package: str, relative: str, install: str) -> Path:
    """A data file of an installed package, found without importing the package.

    Args:
        package: Import name.
        relative: Path inside the package's folder.
        install: The command that installs it, for the error message.

    Raises:
        SettingError: If the package or the file is not there.
    """
    spec = find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        if (Path(folder) / relative).is_file():
            return Path(folder) / relative
    raise SettingError(f"the file {relative} of the package {package} is not installed: run {install!r}.")
