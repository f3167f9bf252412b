"""Cache of folders that take long to build, such as converted models; each appears complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from peft_zoo.common.values import SettingError


def cache_folder() -> Path:
    """Returns the folder of the cache: `PEFT_ZOO_CACHE`, or `~/.cache/peft-zoo`."""
    return Path(os.environ.get("PEFT_ZOO_CACHE") or Path.home() / ".cache" / "peft-zoo")


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """Returns the folder `name` of the cache; `build` fills it if it does not exist.

    The folder is built under a temporary name and renamed, so a killed process leaves no incomplete folder, and of two
    processes that build the same folder one result is kept.

    Args:
        name: Name of the folder; a new version of its content needs a new name.
        build: Fills the empty folder that it is given.

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
            if not final.is_dir():  # else another process has built it
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def package_file(package: str, relative: str, install: str) -> Path:
    """Returns the path of a data file of an installed package, without importing the package.

    Args:
        package: Import name.
        relative: Path below the folder of the package.
        install: Command that installs the package, for the error message.

    Raises:
        SettingError: If the package is not installed or lacks the file.
    """
    spec = find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        if (Path(folder) / relative).is_file():
            return Path(folder) / relative
    raise SettingError(f"the file {relative} of the package {package} is not installed: run {install!r}.")
