"""The recipe of a composition: which LoRAs, by which rule, in which order, with which cache."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from peft_zoo import registration
from peft_zoo.adapters.base.config import option

METHODS = ("merge", "merge_normalized", "switch", "w_switch", "composite", "cmlora")
MERGES = ("merge", "merge_normalized")
ABOVE_0, ABOVE_1 = math.nextafter(0, 1), math.nextafter(1, 2)
RANGES = (  # of numbers: from the first, to below the second
    ("phase_border", 0, ABOVE_1, "use a share from 0 to 1"),
    ("dominance_decay", 0, 1, "use a number from 0 to below 1"),
    ("dominance_floor", 0, math.inf, "use a number of at least 0: no weight is negative"),
    ("dominance_init", ABOVE_0, math.inf, "use a positive number or None"),
)


@dataclass(frozen=True)
class Roles:
    """What a recipe says about the adapters that are there, every name checked.

    Attributes:
        order: The adapters, in the order in which they take turns.
        high: Those that may dominate before the border of the phases.
        low: Those that may after it.
        weights: Strength of each adapter.
    """

    order: tuple[str, ...]
    high: tuple[str, ...]
    low: tuple[str, ...]
    weights: dict[str, float]


@dataclass
class CachedLoraConfig(PeftConfig):
    """A recipe for several LoRAs on one diffusers denoiser. It has no weights of its own, and nothing is trained.

    Raises:
        ValueError: For every field with a value that cannot work, naming the field, the value and the fix.
    """

    method_name: ClassVar[str] = "cached_lora"
    #: A recipe combines trained adapters: there is nothing in it to train.
    trainable: ClassVar[bool] = False

    adapters: dict[str, str | None] | list[str] | None = option(
        None,
        "Name of each LoRA and its path or Hub id; a list of names where they are loaded already; None: all LoRAs on "
        "the denoiser.",
    )
    method: str = option(
        "cmlora",
        "merge, merge_normalized (updates of equal norm), switch, w_switch (turns in proportion to weights), composite "
        "or cmlora.",
    )
    weights: dict[str, float] | list[float] | None = option(
        None, "Strength of each adapter, times the scale it has; for w_switch its share of the steps. None: 1."
    )
    order: list[str] | str = option(
        "given", "In which order adapters take turns: a list of names, 'given' (as in adapters), or 'profile'."
    )
    high: list[str] | None = option(
        None, "cmlora: adapters that dominate before phase_border. None: from the profile, or the rest of low, or all."
    )
    low: list[str] | None = option(None, "cmlora: adapters that dominate after phase_border, likewise.")
    phase_border: float = option(0.545, "Share of the steps after which low dominates.")
    switch_every: int = option(5, "Steps of one turn of switch, and on average of w_switch.")
    dominance_init: float | None = option(
        None, "cmlora: how much more the dominant adapter counts than another, at first; None: their number - 0.5."
    )
    dominance_decay: float = option(0.5, "What the k-th change of the dominant adapter takes off that, to the power k.")
    dominance_floor: float = option(1.0, "What is always left of it; 1 is the mean of all.")
    cache: bool = option(True, "cmlora: adapters other than the dominant one reuse their own deep features.")
    cache_early: int = option(2, "Steps from one refresh to the next before the first and after the second border.")
    cache_middle: int = option(3, "The same between the two borders.")
    cache_borders: tuple[float, float] = option((0.375, 0.875), "The two borders, as shares of the steps.")
    max_age: int = option(10, "Steps after which a feature is too old to be used; 0 refreshes everything always.")
    batched: bool = option(False, "Passes of one step in one batch, with peft's mixed batches, instead of a loop.")
    profile: dict[str, float] | None = option(
        None, "Measured share of high frequencies of each adapter (profile_frequency)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = registration.peft_type_of(type(self))
        self._name_adapters()
        self._check_values()
        if self.adapters:
            self.roles(list(self.adapters))

    @property
    def sources(self) -> dict[str, str | None]:
        """Path or Hub id of each adapter that the recipe names."""
        return dict(self.adapters) if isinstance(self.adapters, dict) else {}

    def _name_adapters(self) -> None:
        """Turns lists into dicts by name; the order goes into `order`, because saved JSON has its keys sorted."""
        given = self.adapters
        if isinstance(given, list):
            self._require(len(set(given)) == len(given), "adapters", "name each adapter once")
            self.adapters = given = dict.fromkeys(given)
        names = list(given or ())
        named = all(isinstance(name, str) and name and "." not in name for name in names)
        self._require(given is None or (isinstance(given, dict) and named), "adapters", "use names without dots")
        self._require(given is None or bool(given), "adapters", "name one, or use None for all that are loaded")
        whence = all(source is None or (isinstance(source, str) and source) for source in self.sources.values())
        self._require(whence, "adapters", "use a path or Hub id as text for each, or None where it is loaded")
        if isinstance(self.weights, list):
            fix = "give one weight for each of adapters, or a dict by name"
            self._require(len(self.weights) == len(names), "weights", fix)
            self.weights = dict(zip(names, self.weights, strict=True))
        self._require(self.weights is None or isinstance(self.weights, dict), "weights", "use a dict by name")
        if self.order == "given" and names:
            self.order = names

    def _check_values(self) -> None:
        self._require(self.method in METHODS, "method", f"use one of {', '.join(METHODS)}")
        fix = "use 'given', 'profile' or a list of names"
        named = _is_names(self.order) and len(self.order) > 0
        self._require(named or self.order in ("given", "profile"), "order", fix)
        for name in ("high", "low"):
            self._require(getattr(self, name) is None or _is_names(getattr(self, name)), name, "use a list of names")
        profile: Any = self.profile
        measured = profile is None or (isinstance(profile, dict) and all(map(_is_number, profile.values())))
        self._require(measured, "profile", "use a dict with a number for each adapter")
        self.profile = profile and _floats(profile)
        fix = "measure it with profile_frequency() and store() it in the recipe"
        self._require(self.order != "profile" or bool(self.profile), "order", fix)
        for name in ("switch_every", "cache_early", "cache_middle"):
            value = getattr(self, name)
            self._require(type(value) is int and value > 0, name, "use an integer of at least 1")
        self._require(type(self.max_age) is int and self.max_age >= 0, "max_age", "use an integer of at least 0")
        for name in ("cache", "batched"):
            self._require(type(getattr(self, name)) is bool, name, "use True or False")
        weights: Any = self.weights
        fix = "use a number for each adapter; set the scales of blocks with set_adapters()"
        self._require(all(map(_is_number, (weights or {}).values())), "weights", fix)
        self.weights = weights and _floats(weights)
        fix = "use two shares from 0 to 1, the smaller one first"
        borders: Any = self.cache_borders
        pair = isinstance(borders, (list, tuple)) and len(borders) == 2 and all(map(_is_number, borders))
        self._require(pair and 0 <= borders[0] <= borders[1] <= 1, "cache_borders", fix)
        self.cache_borders = (float(borders[0]), float(borders[1]))  # JSON has only lists
        for name, least, most, fix in RANGES:
            value = getattr(self, name)
            inside = _is_number(value) and least <= value < most
            self._require(inside or (name == "dominance_init" and value is None), name, fix)
            setattr(self, name, None if value is None else float(value))

    def roles(self, available: Sequence[str]) -> Roles:
        """What the recipe says about the adapters of a denoiser.

        Args:
            available: Names of the adapters that there are.

        Raises:
            ValueError: If the recipe names an adapter that is not there, or one twice, or leaves one out.
        """
        names = list(self.adapters or available)
        self._check_names("adapters", names, available)
        order = names if self.order == "given" else self.order
        if order == "profile":
            shares = self.profile or {}
            self._check_names("profile", shares, names, whole=True)
            order = sorted(names, key=lambda name: -shares[name])
        self._check_names("order", order, names, whole=True)
        high, low = self._phases(list(order))
        given: Any = self.weights or {}
        weights = dict.fromkeys(names, 1.0) | given
        self._check_names("weights", weights, names)
        enough = self.method != "w_switch" or (min(weights.values()) >= 0 and sum(weights.values()) > 0)
        self._require(enough, "weights", "w_switch shares the steps: use numbers of at least 0, not all of them 0")
        return Roles(tuple(order), high, low, weights)

    def _phases(self, order: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Who dominates early and who late, each in the order of turns; a set that would be empty is all of them."""
        high, low = self.high, self.low
        if high is None and low is None and self.order == "profile":
            high, low = split(self.profile or {})
        self._check_names("high", high or (), order)
        self._check_names("low", low or (), order)
        if high is None:
            high = [name for name in order if name not in (low or ())]
        if low is None:
            low = [name for name in order if name not in high]
        both = set(high) & set(low)
        if both or set(high) | set(low) != set(order):
            raise ValueError(
                f"CachedLoraConfig: high={high} and low={low} cannot be used; every one of {order} belongs to exactly "
                "one of the two. Leave one of them out to give it the rest."
            )
        return tuple(n for n in order if n in high or not high), tuple(n for n in order if n in low or not low)

    def _check_names(self, field: str, names: Iterable[str], known: Sequence[str], whole: bool = False) -> None:
        names = list(names)
        unknown = [name for name in names if name not in known]
        missing = [name for name in known if name not in names] if whole else []
        if unknown or missing or len(set(names)) < len(names):
            trouble = f"there is no adapter {unknown}" if unknown else f"{missing} is left out"
            trouble = trouble if unknown or missing else "a name occurs twice"
            raise ValueError(
                f"CachedLoraConfig: {field}={names} cannot be used; {trouble}. The adapters are {list(known)}."
            )

    def _require(self, condition: bool, name: str, fix: str) -> None:
        if not condition:
            raise ValueError(f"CachedLoraConfig: {name}={getattr(self, name)!r} cannot be used; {fix}.")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as peft does, with a file of no weights beside it: `PeftModel.from_pretrained` asks for one."""
        super().save_pretrained(save_directory, **kwargs)
        weights = Path(save_directory) / SAFETENSORS_WEIGHTS_NAME
        if not weights.exists():
            save_file({}, weights, metadata={"format": "pt"})


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of any kind, numpy's among them, as JSON has them."""
    return {name: float(value) for name, value in values.items()}


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def split(shares: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Names with a high and with a low share, split at the largest gap between neighbours; one name alone is high."""
    order = sorted(shares, key=lambda name: -shares[name])
    gaps = [shares[one] - shares[other] for one, other in itertools.pairwise(order)]
    cut = 1 + gaps.index(max(gaps)) if gaps else 1
    return order[:cut], order[cut:]


__all__ = ["CachedLoraConfig"]
