"""Cache of folders that take long to build, such as converted models; each appears complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from peft_zoo.common.atomic import new_folder
from peft_zoo.common.values import SettingError


def cache_folder() -> Path:
    """Returns the folder of the cache: `PEFT_ZOO_CACHE`, or `~/.cache/peft-zoo`."""
    return Path(os.environ.get("PEFT_ZOO_CACHE") or Path.home() / ".cache" / "peft-zoo")


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """Returns the folder `name` of the cache; `build` fills it if it does not exist.

    A new version of the content needs a new name. A killed process leaves no incomplete folder, and of two processes
    that build the same folder one result is kept.
    """
    final = cache_folder() / name
    if final.is_dir():
        return final
    try:
        with ExitStack() as stack:
            try:
                work = stack.enter_context(new_folder(final))
            except OSError as error:
                raise SettingError(
                    f"PEFT_ZOO_CACHE={str(cache_folder())!r} cannot be written ({error.strerror}): "
                    "set it to a folder you may write to."
                ) from error
            build(work)
    except (OSError, ValueError):
        if not final.is_dir():  # else another process has built it
            raise
    return final


def package_file(package: str, relative: str, install: str) -> Path:
    """Returns the path of a file of an installed package without importing it; `install` is the command to name."""
    spec = find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        if (Path(folder) / relative).is_file():
            return Path(folder) / relative
    raise SettingError(f"the file {relative} of the package {package} is not installed: run {install!r}.")
