"""Where the files of a saved adapter are, and the checks of these untrusted files that need no model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from peft_zoo.common.checks import check, is_number
from peft_zoo.io.folder import check_regular
from peft_zoo.io.lora_settings import MAX_RANK
from peft_zoo.io.safetensors import FLOATS, TensorFile
from peft_zoo.io.strict_json import read_json

#: Attribute of a configuration that was loaded, with its `AdapterSource`; it is no field and never saved.
SOURCE = "_source"
MAX_NUMBER = 1e9  # of a scale, rate or count; only seeds may be larger
MAX_ENTRIES = 100_000  # of a list or dictionary

# Also what `re.escape` makes of the name of a module, and peft's own way to write the end of one.
_NAME = r"(?:\^|\.\*\\\.)?(?:[\w.\-]|\\[.\-_])*\$?"
_LITERAL = re.compile(rf"{_NAME}(?:\|{_NAME})*")  # names and alternatives are matched in linear time
_ADAPTER_NAME = re.compile("[A-Za-z0-9_-]{1,64}")
_SHORTHANDS = ("all-linear", "dummy-target-modules")


def check_adapter_name(name: object) -> None:
    """Raises a ValueError unless `name` is 1 to 64 letters, digits, '_' and '-': it becomes the name of a folder."""
    valid = isinstance(name, str) and _ADAPTER_NAME.fullmatch(name) is not None
    check(valid, "adapter_name", name, "use 1 to 64 letters, digits, '_' and '-'")


@dataclass(frozen=True)
class AdapterSource:
    """A saved adapter in a local folder or a repository of the Hub.

    Attributes:
        path: Folder, or id of a repository if there is no such folder.
        subfolder: Folder in it that has the adapter.
        hub: Further arguments of `huggingface_hub.hf_hub_download`, such as `revision` and `token`.
    """

    path: str
    subfolder: str | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = inspect.signature(hf_hub_download).parameters
        for name, value in self.hub.items():
            check(name in known, name, value, "it is no argument of `huggingface_hub.hf_hub_download`; remove it")

    @property
    def folder(self) -> Path:
        """The local folder; it does not exist for a repository."""
        return Path(self.path, self.subfolder or "")

    @property
    def _where(self) -> str:
        """The place, for messages; the Hub answers alike if it has no such file and if there is no network."""
        return str(self.folder) if Path(self.path).exists() else f"{self.folder} (on the Hub, as far as it is reached)"

    def file(self, name: str) -> Path | None:
        """Returns the path of a file of the adapter, downloaded if necessary; None if there is none.

        Raises:
            ValueError: If it is no regular file, such as a named pipe, or a link to a place outside the folder.
        """
        if Path(self.path).exists():
            path = self.folder / name
            if not (path.is_symlink() or path.exists()):
                return None
            check_regular(path, Path(self.path))
            return path
        try:
            return Path(hf_hub_download(self.path, name, subfolder=self.subfolder, **self.hub))
        except EntryNotFoundError:
            return None
        except Exception as error:  # a wrong id, no network, no access
            raise ValueError(f"{name} of {self.path!r}, no folder, cannot be had from the Hub: {error}") from error

    def weights(self) -> Path:
        """Returns the path of the safetensors file.

        Raises:
            ValueError: If there is none. A pickle is named in the error and never opened.
        """
        path = self.file(SAFETENSORS_WEIGHTS_NAME)
        if path is None:
            pickle = Path(self.path).exists() and (self.folder / WEIGHTS_NAME).exists()
            found = f"only {WEIGHTS_NAME}, a pickle that can run code" if pickle else "no weights"
            raise ValueError(
                f"{self._where} has {found}; save the adapter again as {SAFETENSORS_WEIGHTS_NAME} "
                "(`safe_serialization=True`, the default)."
            )
        return path

    def local_folder(self) -> Path:
        """Returns the folder of this machine that has configuration and weights, downloaded if necessary.

        Raises:
            ValueError: If one is missing, or the repository has changed between the two downloads.
        """
        weights, config = self.weights(), self.file(CONFIG_NAME)
        if config is None or config.parent != weights.parent:
            raise ValueError(f"{CONFIG_NAME} and {weights.name} of {self.path} are of two revisions; load it again.")
        return weights.parent

    def module_names(self) -> set[str]:
        """Returns the modules that the weights file has tensors for; empty if there is no valid one."""
        try:
            with TensorFile(self.weights()) as file:
                return module_names(file.tensors)
        except ValueError:
            return set()

    def config(self) -> dict[str, Any]:
        """Returns the fields of the configuration file: standard JSON of at most 16 MB with finite numbers.

        Raises:
            ValueError: If the file is missing or not that.
        """
        path = self.file(CONFIG_NAME)
        if path is None:
            raise ValueError(f"{self._where} has no {CONFIG_NAME}; give the folder or repository of an adapter.")
        return read_json(path)


def check_numbers(config: Any) -> None:
    """Raises a ValueError that names the first field of a configuration with a number or size out of bounds.

    Numbers are finite and at most 1e9, also inside of lists and dictionaries; ranks at most 65,536. A recipe has none.
    Fields that are declared as a number or as a bool have one.
    """
    owner = type(config).__name__
    for item in fields(config):
        value = getattr(config, item.name)
        is_count = isinstance(item.default, (int, float)) and not isinstance(item.default, bool)
        check(not (is_count and isinstance(value, bool)), f"{owner}: {item.name}", value, "use a number")
        declared = item.type if isinstance(item.type, str) else getattr(item.type, "__name__", "")
        if declared == "bool":
            check(isinstance(value, bool), f"{owner}: {item.name}", value, "use true or false")
        elif declared in ("int", "float") and value is not None:
            check(is_number(value), f"{owner}: {item.name}", value, "use a number")
        is_seed = "seed" in item.name or item.name.endswith("_key")
        for number in _numbers(value, item.name):
            most = 2**64 if is_seed else MAX_NUMBER
            valid = is_number(number) and abs(number) <= most
            check(valid, f"{owner}: {item.name}", number, f"use a number of at most {most:g}")
        if item.name.endswith("dropout") and is_number(value):
            check(0 <= value <= 1, f"{owner}: {item.name}", value, "use a probability from 0 to 1")
        if item.name.endswith("_pattern") and item.name != "layers_pattern":
            valid = value is None or isinstance(value, Mapping)
            check(valid, f"{owner}: {item.name}", value, "use a dict from module name to value")
            for key, number in (value or {}).items():
                check(is_number(number), f"{owner}: {item.name}[{key!r}]", number, "use a number")
    default = next((item.default for item in fields(config) if item.name == "r"), None)
    ranks = [("r", config.r)] if hasattr(config, "r") and config.r != default else []  # OFT's default 0 is no rank
    ranks += [(f"rank_pattern[{key!r}]", rank) for key, rank in (getattr(config, "rank_pattern", None) or {}).items()]
    for name, rank in ranks:
        is_rank = type(rank) is int and 1 <= rank <= MAX_RANK
        check(is_rank, f"{owner}: {name}", rank, f"use an integer from 1 to {MAX_RANK}")


def _numbers(value: Any, name: str, depth: int = 0) -> Iterator[int | float]:
    """Yields the numbers in a value and in the lists and dictionaries that it consists of."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple, set, Mapping)):
        check(len(value) <= MAX_ENTRIES, f"len({name})", len(value), f"use at most {MAX_ENTRIES} entries")
        check(depth < 8, name, "…", "nest lists and dictionaries less deeply")
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(each, name, depth + 1)


def expressions(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields field and text of each regular expression in a configuration, other than names of modules.

    peft uses as expressions: `target_modules`, `exclude_modules` and `feedforward_modules` if they are a text,
    `layers_pattern`, the entries of `modules_to_save`, and the keys of every field that ends in `_pattern`.
    """
    for name, value in config.items():
        texts: Iterable[Any] = ()
        if name in ("target_modules", "exclude_modules", "feedforward_modules"):
            texts = [value] if isinstance(value, str) and value not in _SHORTHANDS else ()
        elif name.endswith("_pattern") or name == "modules_to_save":
            texts = value or () if isinstance(value, (Mapping, list, tuple, set)) else [] if value is None else [value]
        for text in texts:
            if not isinstance(text, str) or not _LITERAL.fullmatch(text):
                yield name, text


def check_literal(config: Mapping[str, Any], modules: Callable[[], Iterable[str]]) -> None:
    """Raises a ValueError if a configuration from a file has a regular expression, which can take forever to match.

    Args:
        config: Fields of the configuration.
        modules: Returns the modules that the weights file has tensors for, for the message.
    """
    for name, text in expressions(config):
        names = sorted(modules())
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"
        raise ValueError(
            f"{name}={text!r} is a regular expression, and expressions from a file are not run; write the names of "
            f"modules instead (the file has tensors for {listed}), or, if you trust the file, use "
            "`peft_zoo.load_adapter(..., trust_patterns=True)`."
        )


def module_names(keys: Iterable[str]) -> set[str]:
    """Returns the modules of the base model that the keys of a weights file belong to."""
    bare = (key.removeprefix("base_model.model.") for key in keys)
    return {name for key in bare if (name := re.split(r"\.(?:lora_|zoo_)", key, maxsplit=1)[0]) != key}


def check_finite(file: TensorFile) -> None:
    """Raises a ValueError that names the first tensor with 8-bit floats, or with a value that is NaN or infinite."""
    for key, info in file.tensors.items():
        if info.dtype.is_floating_point and info.dtype not in FLOATS:
            raise ValueError(f"{file.path}: {key} has dtype {info.dtype}; save the adapter again in a wider one.")
        file.read_finite(key)
