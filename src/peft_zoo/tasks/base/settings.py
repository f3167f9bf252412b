"""Settings of a fine-tuning run; the flags and YAML files of `peft-zoo train` are made from the fields."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_zoo.common.settings import Layer, flag, method_options, setting, setting_fields
from peft_zoo.common.values import SettingError

BASELINE = "lora"  # peft's own LoRA, to compare with
# YAML files that ship with the package, by name.
PRESETS = {path.stem: path for path in sorted((Path(__file__).parents[1] / "presets").glob("*.yaml"))}


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one fine-tuning run; None selects the default of the task or the method.

    Raises:
        SettingError: If a number is out of range.
    """

    task: str = setting("the task: language, vision or diffusion", "language")
    method: str | None = setting("a registered method, see `peft-zoo methods`, or lora for peft's own")
    model: str | None = setting("a built-in model, a Hub id or a path")
    data: str | None = setting("a built-in data set or a path")
    steps: int | None = setting("optimizer steps")
    batch_size: int | None = setting("examples per step")
    learning_rate: float | None = setting("peak learning rate of AdamW, linear decay (default: depends on the method)")
    max_length: int | None = setting("language: tokens per example", task="language")
    image_size: int | None = setting("vision: pixels per side, a multiple of the patch size", task="vision")
    concept: str | None = setting("diffusion: concept to learn: bag, gradient, checker or square", task="diffusion")
    train_size: int | None = setting("maximum number of training examples")
    eval_size: int | None = setting("maximum number of held-out examples")
    seed: int = setting("seed of the adapter's initialization and of the order of the data", 0)
    output: str = setting("folder for the adapter, summary.json and report.html", "peft-zoo-output", metavar="DIR")
    options: dict[str, str] = method_options()

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
        """Returns a copy in which fields that are None have the values of `defaults`."""
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def refuse_foreign(self) -> None:
        """Raises a SettingError if a setting of another task has a value."""
        for item in setting_fields(TrainSettings):
            owner = item.metadata.get("task")
            if owner not in (None, self.task) and getattr(self, item.name) is not None:
                raise SettingError(f"{flag(item.name)} belongs to --task {owner}: leave it out.")

    def require(self, name: str, fix: str) -> Any:
        """Returns the value of field `name`; if it is None, raises a SettingError that ends with `fix`."""
        value = getattr(self, name)
        if value is None:
            raise SettingError(f"{flag(name)} is missing: {fix}")
        return value
