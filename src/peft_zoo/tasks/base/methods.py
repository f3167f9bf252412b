"""Builds the configuration of a method from its name and text values, and describes the registered methods."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from transformers import TrainerCallback

from peft_zoo.common.values import SettingError, parse_value, unknown
from peft_zoo.registration import methods
from peft_zoo.tasks.base.settings import BASELINE

TABLE_WIDTH = 100  # columns of the table of methods


def config_class(name: str) -> type[PeftConfig]:
    """Returns the configuration class of a method.

    Raises:
        SettingError: If the name is neither registered nor the baseline; lists the valid ones.
    """
    registered = methods()
    if name in registered:
        return registered[name].config_cls
    if name == BASELINE:
        return LoraConfig
    raise unknown("method", name, [*registered, BASELINE])


def suggested_settings(name: str | None) -> dict[str, Any]:
    """Returns the settings that a method suggests; its configuration class may have a `suggested_learning_rate`.

    Raises:
        SettingError: If there is no such method.
    """
    rate = None if name is None else getattr(config_class(name), "suggested_learning_rate", None)
    return {} if rate is None else {"learning_rate": rate}


def build_config(
    name: str, options: Mapping[str, str], defaults: Mapping[str, Any], steps: int | None = None
) -> PeftConfig:
    """Builds a method's configuration.

    Args:
        name: Short name of the method.
        options: Fields as text; each is parsed by the annotation of its field.
        defaults: Fields that the task suggests, such as `target_modules`; `options` win, and fields that the method
            lacks are ignored.
        steps: Optimizer steps of the run, passed to the `for_training` of the configuration, if it has one, which fills
            in the length of a schedule and validates it; None if nothing is trained.

    Raises:
        SettingError: If a field does not exist, does not parse, or is refused by the configuration.
    """
    cls = config_class(name)
    hints = typing.get_type_hints(cls)
    valid = _settable_fields(cls)
    chosen: dict[str, Any] = {}
    for key, text in options.items():
        if key not in valid:
            raise unknown(f"field of {name}", key, valid)
        chosen[key] = parse_value(text, hints[key], f"{name} field {key!r}")
    names = {item.name for item in dataclasses.fields(cls)}
    suggested = {key: value for key, value in defaults.items() if key in names}
    try:
        config = cls(**{**suggested, **chosen})
        for_training = getattr(config, "for_training", None)  # peft's own configurations have none
        return config if steps is None or for_training is None else for_training(steps)
    except ValueError as error:
        raise SettingError(" ".join(str(error).split())) from error


def check_options(name: str, options: Mapping[str, str], steps: int) -> None:
    """Validates the choice of method and its fields without a model.

    Raises:
        SettingError: If the method, a field or a value is unknown or invalid, or the method has nothing to train.
    """
    if name in methods() and not methods()[name].trainable:
        raise SettingError(f"method {name!r} has nothing to train: it combines trained adapters; see peft-zoo compose.")
    build_config(name, options, {"target_modules": "all-linear"}, steps)


def callbacks(name: str, model: PeftModel) -> list[TrainerCallback]:
    """Returns the callbacks for `transformers.Trainer` that a method needs to train `model`."""
    method = methods().get(name)
    return [] if method is None or method.callback is None else [method.callback(model)]


def describe_methods() -> list[dict[str, Any]]:
    """Returns the name, summary, cost formulas, paper and settable fields of each registered method as plain values."""
    keys = ("name", "peft_type", "summary", "parameters", "memory", "flops", "paper")
    return [
        {**{key: getattr(method, key) for key in keys}, "fields": _settable_fields(method.config_cls)}
        for method in methods().values()
    ]


def method_table() -> str:
    """Returns the registered methods with their costs, and the baseline, as text for a terminal."""
    blocks = [_block(method) for method in describe_methods()]
    legend = (
        "Costs of one adapted (out, in) matrix in a step over T tokens: trainable parameters, bytes kept for the "
        "backward pass, FLOPs of the matrix products (a frozen linear layer alone takes 4·T·in·out)."
    )
    baseline = f"{BASELINE}\n  peft's own LoRA, accepted by --method to compare with."
    return "\n\n".join([*blocks, baseline, textwrap.fill(legend, TABLE_WIDTH)])


def _block(method: Mapping[str, Any]) -> str:
    """Formats one method: its name, its summary, and a line for each cost."""
    rows = {key: method[key] for key in ("parameters", "memory")}
    rows |= {"FLOPs": method["flops"], "paper": method["paper"], "--set": ", ".join(method["fields"])}
    lines = [
        textwrap.fill(value, TABLE_WIDTH, initial_indent=f"  {key:<12}", subsequent_indent=" " * 14)
        for key, value in rows.items()
    ]
    summary = textwrap.fill(method["summary"], TABLE_WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([method["name"], summary, *lines])


def _settable_fields(cls: type[PeftConfig]) -> list[str]:
    """Returns the fields of the method itself, without those that peft fills in."""
    bookkeeping = {item.name for item in dataclasses.fields(PeftConfig)}
    return [item.name for item in dataclasses.fields(cls) if item.init and item.name not in bookkeeping]
