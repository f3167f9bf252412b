"""What the user can say about a run, in one dataclass: the command line and the YAML file are generated from its
fields.

Sources are layered: task defaults, then the preset, then the file, then the flags; a later source wins. A preset is
nothing but a YAML file that ships with the package.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from peft_zoo.common.values import SettingError, as_text, parse_value, unknown

Layer = Mapping[str, Any]


def _setting(help_text: str, default: Any = None, task: str | None = None) -> Any:
    """A setting; one of a single task names it."""
    text = help_text if task is None else f"{task}: {help_text}"
    return field(default=default, metadata={"help": text, "task": task})


@dataclass(frozen=True)
class TrainSettings:
    """One fine-tuning run. None stands for "what the task suggests".

    Raises:
        SettingError: If a number is out of range.
    """

    task: str = _setting("the job: language, vision or diffusion", "language")
    method: str | None = _setting("a registered method, see `peft-zoo methods`, or lora for peft's own")
    model: str | None = _setting("a built-in model, a Hub id or a path")
    data: str | None = _setting("a built-in data set or a path")
    steps: int | None = _setting("optimizer steps")
    batch_size: int | None = _setting("examples in a step")
    learning_rate: float | None = _setting("peak learning rate of AdamW, linear decay (default: what suits the method)")
    max_length: int | None = _setting("tokens in an example", task="language")
    image_size: int | None = _setting("pixels along each side, a multiple of the patch size", task="vision")
    concept: str | None = _setting("what the adapter learns: bag, gradient, checker or square", task="diffusion")
    train_size: int | None = _setting("at most so many training examples")
    eval_size: int | None = _setting("at most so many held-out examples")
    seed: int = _setting("seed of the adapter's initial values and of the order of the data", 0)
    output: str = _setting("folder for the adapter, summary.json and report.html", "peft-zoo-output")
    options: dict[str, str] = field(default_factory=dict, metadata={"help": "the method's own fields as text"})

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_length", "image_size", "train_size", "eval_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{flag(name)} cannot be {value}: give a whole number of at least 1.")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise SettingError(f"--learning-rate cannot be {self.learning_rate}: give a number above 0, such as 0.001.")
        if not 0 <= self.seed < 2**32:
            raise SettingError(f"--seed cannot be {self.seed}: give a whole number from 0 to 4294967295.")

    def completed(self, defaults: Layer) -> TrainSettings:
        """A copy in which every None that `defaults` has a value for is filled in."""
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def refuse_foreign(self) -> None:
        """Make sure that nothing was set that belongs to another task.

        Raises:
            SettingError: If something was.
        """
        for item in flag_fields():
            owner = item.metadata["task"]
            if owner not in (None, self.task) and getattr(self, item.name) is not None:
                raise SettingError(f"{flag(item.name)} belongs to --task {owner}: leave it out.")

    def require(self, name: str, why: str) -> Any:
        """The value of a field that the run cannot do without.

        Raises:
            SettingError: If it is None; `why` says what to give.
        """
        value = getattr(self, name)
        if value is None:
            raise SettingError(f"{flag(name)} is missing: {why}")
        return value


def flag(name: str) -> str:
    """The command-line flag of a field: `batch_size` is `--batch-size`."""
    return "--" + name.replace("_", "-")


def flag_fields() -> list[dataclasses.Field[Any]]:
    """The fields that have a flag of their own; `options` is written with `--set` instead."""
    return [item for item in dataclasses.fields(TrainSettings) if item.name != "options"]


def resolve_settings(*layers: Layer) -> TrainSettings:
    """Merge layers of text values, a later one winning, and parse them.

    Args:
        layers: Mappings from field name to text or to a plain value; `options` maps the method's fields likewise and
            is merged key by key.

    Raises:
        SettingError: If a value does not parse or is out of range.
    """
    hints = typing.get_type_hints(TrainSettings)
    merged: dict[str, Any] = {}
    options: dict[str, str] = {}
    for layer in layers:
        for name, value in layer.items():
            if name == "options":
                options.update({key: as_text(item) for key, item in value.items()})
            else:
                merged[name] = parse_value(as_text(value), hints[name], flag(name))
    return TrainSettings(**merged, options=options)


def read_settings_file(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose keys are flag names (`batch-size` or `batch_size`), with the method's fields under `set`.

    Raises:
        SettingError: If the file cannot be read, is no mapping, or has a key that is no flag.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(
            f"--config {str(path)!r} cannot be read: {error.strerror}; give an existing YAML file."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise SettingError(
            f"--config {str(path)!r} is not YAML ({reason}): write lines such as 'steps: 60'."
        ) from error
    if not isinstance(content, dict):
        raise SettingError(f"--config {str(path)!r} is no mapping: write lines such as 'steps: 60'.")
    return _checked_layer(content, f"key in {str(path)!r}")


def _checked_layer(content: Mapping[Any, Any], kind: str) -> dict[str, Any]:
    """Turn the keys of a file into field names.

    Raises:
        SettingError: If a key is no flag, or `set` is no mapping.
    """
    valid = [flag(item.name)[2:] for item in flag_fields()] + ["set"]
    layer: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name not in valid:
            raise unknown(kind, str(key), valid)
        if name == "set" and not isinstance(value, dict):
            raise SettingError(f"set cannot be {value!r}: write one line 'field: value' for each field of the method.")
        if value is not None:
            layer["options" if name == "set" else name.replace("-", "_")] = value
    return layer


def preset_names() -> list[str]:
    """The presets that ship with the package."""
    folder = files("peft_zoo.tasks") / "presets"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """The settings of a preset.

    Raises:
        SettingError: If there is no preset of that name.
    """
    if name not in preset_names():
        raise unknown("preset", name, preset_names())
    return read_settings_file(str(files("peft_zoo.tasks") / "presets" / f"{name}.yaml"))
