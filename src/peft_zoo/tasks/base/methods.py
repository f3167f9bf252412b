"""From a method's name and fields written as text to a `PeftConfig`, and the table of methods."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from transformers import TrainerCallback

from peft_zoo.common.values import SettingError, parse_value, unknown
from peft_zoo.registration import Method, methods

BASELINE = "lora"  # peft's own LoRA, to compare with
TABLE_WIDTH = 100  # columns of the table of methods


def config_class(name: str) -> type[PeftConfig]:
    """The configuration class of a method.

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
    """Settings that suit a method better than the task's: its configuration class may carry `suggested_learning_rate`.

    Raises:
        SettingError: If there is no such method.
    """
    rate = None if name is None else getattr(config_class(name), "suggested_learning_rate", None)
    return {} if rate is None else {"learning_rate": rate}


def build_config(name: str, options: Mapping[str, str], defaults: Mapping[str, Any], steps: int) -> PeftConfig:
    """Make a method's configuration.

    A schedule that needs the number of optimizer steps (a field `total_step` beside `target_sparsity`) gets it when
    the user gave the target but not the length; one that has a `check_steps` is asked whether it fits.

    Args:
        name: Short name of the method.
        options: Fields as the user wrote them; each is parsed by the annotation of its field.
        defaults: What the task suggests, such as `target_modules`; `options` win, and fields the method lacks are
            left out.
        steps: Optimizer steps of the run.

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
    if chosen.get("target_sparsity") is not None and chosen.get("total_step") is None and "total_step" in valid:
        chosen["total_step"] = steps
    names = {item.name for item in dataclasses.fields(cls)}
    suggested = {key: value for key, value in defaults.items() if key in names}
    try:
        config = cls(**{**suggested, **chosen})
        if hasattr(config, "check_steps"):
            config.check_steps(steps)
        return config
    except ValueError as error:
        raise SettingError(" ".join(str(error).split())) from error


def check_options(name: str, options: Mapping[str, str]) -> None:
    """Report a mistake in the choice of method or in its fields, without a model.

    Raises:
        SettingError: As `build_config`, and if there is nothing to train.
    """
    if name in methods() and not methods()[name].trainable:
        raise SettingError(f"method {name!r} has nothing to train: it combines what is trained; see peft-zoo compose.")
    build_config(name, options, {"target_modules": "all-linear"}, steps=2**31)


def callbacks(name: str, model: PeftModel) -> list[TrainerCallback]:
    """What the method wants to do during training, as callbacks for `transformers.Trainer`."""
    method = methods().get(name)
    return [] if method is None or method.callback is None else [method.callback(model)]


def method_table() -> str:
    """The registered methods with their cost formulas, and the baseline, as text for a terminal."""
    blocks = [_block(method) for method in methods().values()]
    legend = (
        "Costs of one adapted (out, in) matrix in a step over T tokens: trainable parameters, bytes kept for the "
        "backward pass, FLOPs of the matrix products (a frozen linear layer alone takes 4·T·in·out)."
    )
    baseline = f"{BASELINE}\n  peft's own LoRA, accepted by --method to compare with."
    return "\n\n".join([*blocks, baseline, textwrap.fill(legend, TABLE_WIDTH)])


def _block(method: Method) -> str:
    """One method: its name, what it is, and a line for each cost."""
    rows = {
        "parameters": method.parameters,
        "memory": method.memory,
        "FLOPs": method.flops,
        "paper": method.paper,
        "--set": ", ".join(_settable_fields(method.config_cls)),
    }
    lines = [
        textwrap.fill(value, TABLE_WIDTH, initial_indent=f"  {key:<12}", subsequent_indent=" " * 14)
        for key, value in rows.items()
    ]
    return "\n".join(
        [method.name, textwrap.fill(method.summary, TABLE_WIDTH, initial_indent="  ", subsequent_indent="  "), *lines]
    )


def _settable_fields(cls: type[PeftConfig]) -> list[str]:
    """The fields a user may set: those of the method itself, not peft's book-keeping, that text can express."""
    bookkeeping = {item.name for item in dataclasses.fields(PeftConfig)}
    return [item.name for item in dataclasses.fields(cls) if item.init and item.name not in bookkeeping]
