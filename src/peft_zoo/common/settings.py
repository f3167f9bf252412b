"""Settings as dataclasses: each field is a flag of the command line and a key of its YAML files.

Layers of settings are merged, a later one winning: preset, file, flags. Values arrive as text or as plain YAML values
and are parsed by the annotation of their field.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from peft_zoo.common.values import SettingError, as_text, parse_value, unknown

LONGEST_FILE = 1 << 20  # characters of a YAML file
Layer = Mapping[str, Any]
Settings = TypeVar("Settings")


def setting(help: str, default: Any = None, **metadata: Any) -> Any:
    """Declares a field of a settings dataclass.

    Args:
        help: One line for `--help`.
        default: Default value; of a table (`dict[str, str]`) always an empty one.
        **metadata: `metavar`: Placeholder of the value in `--help`. `positional=True`: An argument without a flag;
            a field of type `list` takes several.
            `required=True`: The user must give a value. `flag`: Name of the flag if it is not that of the field.
            `short`: One-letter form of the flag, such as `-o`.
            `example`: Example of a KEY=VALUE pair of a table. `unique=True`: No key of a table may be given twice.
            `task`: The one task that the setting belongs to.
    """
    if default is dict:
        return dataclasses.field(default_factory=dict, metadata={"help": help, **metadata})
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def method_options() -> Any:
    """Declares the table `--set KEY=VALUE` of fields of a method's configuration."""
    return setting("field of the method's configuration; repeatable", dict, flag="set", example="r=8")


def flag(name: str) -> str:
    """Returns the flag of a field: `batch_size` has the flag `--batch-size`."""
    return "--" + name.replace("_", "-")


def written(item: dataclasses.Field[Any]) -> str:
    """Returns a field as the user writes it: its flag, or its placeholder if it is positional."""
    if item.metadata.get("positional"):
        return str(item.metadata["metavar"])
    return flag(item.metadata.get("flag", item.name))


def setting_fields(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    """Returns the fields of a settings dataclass that a user may set."""
    return [item for item in dataclasses.fields(cls) if item.init]


def is_table(hint: Any) -> bool:
    """Whether a field of this type takes several KEY=VALUE pairs."""
    return typing.get_origin(hint) is dict


def resolve_settings(cls: type[Settings], *layers: Layer) -> Settings:
    """Merges layers of settings by field name, a later one winning, parses their values and makes an instance of `cls`.

    Tables are merged key by key. Mistakes are a `SettingError`.
    """
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in setting_fields(cls)}
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if is_table(hints[name]):
                merged[name] = merged.get(name, {}) | {key: as_text(item) for key, item in value.items()}
            else:
                merged[name] = parse_value(as_text(value), hints[name], written(fields[name]))
    for name, item in fields.items():
        if item.metadata.get("required") and not merged.get(name):
            raise SettingError(f"{written(item)} is missing: give {item.metadata['help']}.")
    return cls(**merged)


def read_settings_file(path: str | Path, cls: type[Any]) -> dict[str, Any]:
    """Reads a YAML file whose keys are flags of `cls`, such as `batch-size`; returns unparsed values by field."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST_FILE + 1)
        if len(text) > LONGEST_FILE:
            raise ValueError(f"it has more than {LONGEST_FILE} characters")
        content = yaml.safe_load(text)
        node: Any = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise SettingError(
            f"--config {str(path)!r} cannot be read: {error.strerror}; give an existing YAML file."
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of bytes, numbers, nested lists
        reason = " ".join(str(error).split())
        raise SettingError(
            f"--config {str(path)!r} is not YAML ({reason}): write lines such as 'steps: 60'."
        ) from error
    if not isinstance(content, dict):
        raise SettingError(f"--config {str(path)!r} is no mapping: write lines such as 'steps: 60'.")
    keys = [key.value for key, _ in node.value]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise SettingError(f"--config {str(path)!r} has the key {twice!r} twice: remove one.")
    hints = typing.get_type_hints(cls)
    valid = {written(item)[2:]: item.name for item in setting_fields(cls) if not item.metadata.get("positional")}
    layer: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name not in valid:
            raise unknown(f"key in {str(path)!r}", str(key), valid)
        if is_table(hints[valid[name]]) and not isinstance(value, dict):
            raise SettingError(f"{name} cannot be {value!r}: write one indented line 'key: value' for each entry.")
        if value is not None:
            layer[valid[name]] = value
    return layer
