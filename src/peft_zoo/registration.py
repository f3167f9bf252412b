"""Registers adapter types in peft; the only module that uses the internals of peft's registry.

`peft.register_peft_method` accepts a method of another package once the enum `PeftType` has a member for it. `PeftType`
cannot be subclassed, so the member is added to the enum's tables here; everything else is peft's function.
"""

from __future__ import annotations

import inspect
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
    """A registered adapter method and its costs.

    Attributes:
        name: Short lower-case name, as in `peft-zoo train --method snell`.
        peft_type: Value of the member of `peft.PeftType`, as saved in `adapter_config.json`.
        config_cls: Configuration class.
        tuner_cls: Tuner class, which peft makes from a configuration.
        summary: One line that says what the method is.
        parameters: Formula for the trainable parameters of one adapted `(out, in)` matrix.
        memory: Formula for the bytes saved for the backward pass of one such matrix, without the frozen layer's.
        flops: Formula for the matrix-multiplication FLOPs of a training step over T tokens, with the frozen layer's.
        paper: Reference, such as an arXiv number.
        callback: Function from the model to the `transformers.TrainerCallback` that the method needs during training;
            None if it needs none.

    Examples:
        >>> from peft_zoo import methods
        >>> method = methods()["snell"]
        >>> method.peft_type, method.parameters
        ('ZOO_SNELL', 'r·(in + out)')
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
        """Whether the method has weights to train; False for a recipe (`trainable = False` in its configuration)."""
        return getattr(self.config_cls, "trainable", True)

    @property
    def saves_plain_lora(self) -> bool:
        """Whether a saved adapter is a plain LoRA but for its type (`saves_plain_lora = True` in its configuration)."""
        return getattr(self.config_cls, "saves_plain_lora", False)


def methods() -> dict[str, Method]:
    """Returns the registered methods by short name, in alphabetical order.

    Examples:
        >>> methods()["snell"].config_cls.__name__
        'SnellConfig'
    """
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
    """Class decorator that registers a tuner class and its configuration class in peft.

    The value of the type is `ZOO_` and the upper-case `method_name` of `config_cls`, such as `"snell"`; the fields of
    `config_cls` are added to its docstring. All other arguments are as in `Method`. The prefix of the parameters is
    the lower-case value and an underscore, as transformers assumes; a tuner on peft's `LoraModel` keeps `lora_`, since
    its tensors are those of a LoRA. Registering a class again (a reload) replaces it. If another package or a later
    peft owns the value, the method is not registered and one warning names the owner.

    Raises:
        ValueError: If `method_name` is not a lower-case name, or the tuner's `prefix` does not match it.
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
    """Returns the member of `PeftType` under which `config_cls` is registered.

    Raises a ValueError that names the owner if another class is registered under the value.
    """
    value = f"{NAMESPACE}{config_cls.method_name}".upper()  # type: ignore[attr-defined]
    owner = PEFT_TYPE_TO_CONFIG_MAPPING.get(value)  # type: ignore[call-overload]
    if owner is None or not any(_same_class(owner, cls) for cls in config_cls.__mro__):
        holder = "no class" if owner is None else f"{owner.__module__}.{owner.__qualname__}"
        raise ValueError(
            f"peft_type={value} belongs to {holder}, so {config_cls.__name__} is not registered. Use that class "
            "instead, or uninstall the package it comes from."
        )
    return PeftType(value)


def _same_class(one: type, other: type) -> bool:
    """Whether two class objects have the same definition, possibly imported twice."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def _document(config_cls: type[PeftConfig]) -> None:
    """Appends the fields and their help texts to the docstring: the method's own first, those of peft last."""
    homes = {name: cls for cls in reversed(config_cls.__mro__) for name in inspect.get_annotations(cls)}
    listed = sorted(fields(config_cls), key=lambda f: config_cls.__mro__.index(homes.get(f.name, config_cls)))
    lines = [f"    {f.name} (`{f.type}`): {f.metadata.get('help', '')}" for f in listed]
    described = inspect.cleandoc(config_cls.__doc__ or "").split("\n\nArgs:")[0]
    config_cls.__doc__ = "\n".join([described, "", "Args:", *lines])


def _add_member(value: str) -> PeftType:
    """Returns `PeftType[value]`, after adding it to the tables of the enum if it is missing.

    `EnumType` cannot add a member and forbids setting one as an attribute; hence `type.__setattr__`. The tables depend
    on the Python version (`_hashable_values_` is new in 3.12).
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
