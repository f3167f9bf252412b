"""Adds adapter types to peft; the only module that knows how peft keeps its registry.

`peft.register_peft_method` accepts a method from outside once the enum `PeftType` has a member for it. `PeftType`
cannot be subclassed, so the member is made here and entered in the enum's own tables; everything else goes through
peft's function.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

Tuner = TypeVar("Tuner", bound=type[BaseTuner])

NAMESPACE = "ZOO_"
_lock = threading.RLock()
_methods: dict[str, Method] = {}


@dataclass(frozen=True)
class Method:
    """One registered adapter method, with what it costs.

    Attributes:
        name: Short lower-case name, as in `--method snell`.
        peft_type: Value of the enum member, as saved in `adapter_config.json`.
        config_cls: The configuration class a user instantiates.
        tuner_cls: The tuner that peft builds from it.
        summary: What the method is, in one line.
        parameters: Trainable parameters of one adapted `(out, in)` matrix.
        memory: Bytes saved for the backward pass of one such matrix, beyond the frozen layer's own.
        flops: Cost of one training step over T tokens in matrix-multiplication FLOPs, the frozen layer included.
        paper: Where the method comes from.
        callback: Makes the `transformers.TrainerCallback` the method wants during training, from the model; None if it
            wants none.
    """

    name: str
    peft_type: str
    config_cls: type[PeftConfig]
    tuner_cls: type[BaseTuner]
    summary: str
    parameters: str
    memory: str
    flops: str
    paper: str
    callback: Callable[[Any], Any] | None = None

    @property
    def trainable(self) -> bool:
        """Whether there is something to train; a recipe (`trainable = False` in its configuration) has no weights."""
        return getattr(self.config_cls, "trainable", True)


def methods() -> dict[str, Method]:
    """The registered methods by short name, in alphabetical order."""
    with _lock:
        return dict(sorted(_methods.items()))


def register(
    config_cls: type[PeftConfig],
    *,
    summary: str,
    parameters: str,
    memory: str,
    flops: str,
    paper: str,
    callback: Callable[[Any], Any] | None = None,
) -> Callable[[Tuner], Tuner]:
    """Class decorator that makes a tuner and its configuration known to peft.

    The type's value is `ZOO_` and the upper-case `method_name` of `config_cls`; the parameter prefix is the lower-case
    value and an underscore, because transformers derives it so. A tuner that derives from peft's `LoraModel` keeps
    `lora_`: its tensors are those of a LoRA. Registering a class again (a reload) replaces the old
    one. If another package or a later peft owns the value, nothing is overridden: the method stays unregistered and one
    warning names the owner.

    Args:
        config_cls: Configuration class with a class attribute `method_name`, such as `"snell"`.
        summary: See `Method`, as for all that follow.
        parameters: Formula.
        memory: Formula.
        flops: Formula.
        paper: Reference.
        callback: Factory.

    Raises:
        ValueError: If `method_name` is not a lower-case name, or `tuner_cls.prefix` does not match it.
    """
    name = config_cls.method_name  # type: ignore[attr-defined]
    value = f"{NAMESPACE}{name}".upper()

    def decorate(tuner_cls: Tuner) -> Tuner:
        if not re.fullmatch("[a-z][a-z0-9_]*[a-z0-9]", name):
            raise ValueError(f"method_name={name!r} of {config_cls.__name__}: use lower-case letters, digits and '_'.")
        prefix = LoraModel.prefix if issubclass(tuner_cls, LoraModel) else f"{value.lower()}_"
        if tuner_cls.prefix != prefix:
            raise ValueError(f"prefix={tuner_cls.prefix!r} of {tuner_cls.__name__}: use {prefix!r}.")
        with _lock:
            owner = PEFT_TYPE_TO_CONFIG_MAPPING.get(value)  # type: ignore[call-overload]
            if owner is not None and not _same_class(owner, config_cls):
                warnings.warn(
                    f"{value} already belongs to {owner.__module__}.{owner.__qualname__}; peft-zoo leaves it alone "
                    f"and does not register {config_cls.__name__}. Uninstall one of the two to choose.",
                    stacklevel=2,
                )
                return tuner_cls
            for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
                mapping.pop(value, None)  # type: ignore[call-overload]
            _add_member(value)
            register_peft_method(name=value.lower(), config_cls=config_cls, model_cls=tuner_cls, prefix=prefix)
            _methods[name] = Method(
                name, value, config_cls, tuner_cls, summary, parameters, memory, flops, paper, callback
            )
            _document(config_cls)
        return tuner_cls

    return decorate


def peft_type_of(config_cls: type[PeftConfig]) -> PeftType:
    """The enum member under which `config_cls` is registered.

    Raises:
        ValueError: If the value belongs to somebody else, naming the owner.
    """
    value = f"{NAMESPACE}{config_cls.method_name}".upper()  # type: ignore[attr-defined]
    owner = PEFT_TYPE_TO_CONFIG_MAPPING.get(value)  # type: ignore[call-overload]
    if owner is None or not any(_same_class(owner, cls) for cls in config_cls.__mro__):
        holder = "nobody" if owner is None else f"{owner.__module__}.{owner.__qualname__}"
        raise ValueError(
            f"peft_type={value} belongs to {holder}, so {config_cls.__name__} is not registered. Use that class "
            "instead, or uninstall the package it comes from."
        )
    return PeftType(value)


def _same_class(one: type, other: type) -> bool:
    """Whether two class objects are the same definition, possibly imported twice."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def _document(config_cls: type[PeftConfig]) -> None:
    """List every field in the docstring, from its help text: `help(config_cls)` then says what the code says."""
    lines = [f"    {f.name} (`{f.type}`): {f.metadata.get('help', '')}" for f in fields(config_cls)]
    config_cls.__doc__ = "\n".join([(config_cls.__doc__ or "").split("\n\nArgs:")[0], "", "Args:", *lines])


def _add_member(value: str) -> PeftType:
    """Return `PeftType[value]`, made and entered in the enum's tables if it is not there yet.

    `EnumType` offers no way to add a member, and forbids setting one as an attribute; hence `type.__setattr__`. Which
    tables there are depends on the Python version (`_hashable_values_` came with 3.12).
    """
    existing = PeftType._value2member_map_.get(value)
    if existing is not None:
        return existing  # type: ignore[return-value]
    member: Any = str.__new__(PeftType, value)
    member._name_ = member._value_ = value
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, value, member)
    PeftType._member_map_[value] = PeftType._value2member_map_[value] = member
    PeftType._member_names_.append(value)
    hashable = getattr(PeftType, "_hashable_values_", None)
    if hashable is not None:
        hashable.append(value)
    return member
