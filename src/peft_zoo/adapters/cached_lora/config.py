"""Configuration of CMLoRA: the LoRAs to compose, their order, how predictions are combined, and the cache."""

from __future__ import annotations

import difflib
import itertools
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file

from peft_zoo.adapters.base.config import MethodConfig, option
from peft_zoo.common.atomic import replaced_file
from peft_zoo.common.checks import is_number
from peft_zoo.io.safetensors import TensorFile
from peft_zoo.io.strict_json import read_json

MERGES = ("merge", "merge_normalized")
NAME = re.compile("[A-Za-z0-9_-]{1,64}")  # a name is that of a folder too
LARGEST = 10**6  # of counts, and of weights, whose sign is free
SHOWN = 8  # names in a message
METHODS = (*MERGES, "switch", "w_switch", "composite", "cmlora")


@dataclass(frozen=True)
class Roles:
    """Validated adapters of a recipe: `order` of turns, dominant early (`high`) or late (`low`), `weights` by name."""

    order: tuple[str, ...]
    high: tuple[str, ...]
    low: tuple[str, ...]
    weights: dict[str, float]


@dataclass
class CachedLoraConfig(MethodConfig, PeftConfig):
    """Recipe for composing several LoRAs on one diffusers denoiser; it has no weights of its own and trains nothing.

    Pass it to `compose`, or to `get_peft_model` to load the LoRAs that it names and compose them in every forward.

    Raises:
        ValueError: If a field has an invalid value; names the field, the value and the fix.

    Examples:
        >>> import tempfile, torch
        >>> from diffusers import UNet2DModel
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_zoo import CachedLoraConfig
        >>> blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
        >>> def unet():
        ...     return UNet2DModel(8, block_out_channels=(8, 8), norm_num_groups=2, **blocks)
        >>> folders = {name: tempfile.mkdtemp() for name in ("knight", "watercolour")}
        >>> for folder in folders.values():
        ...     get_peft_model(unet(), LoraConfig(r=2, target_modules=["conv1"])).save_pretrained(folder)
        >>> recipe = CachedLoraConfig(adapters=folders, method="composite")
        >>> model = get_peft_model(unet(), recipe)
        >>> with torch.no_grad():
        ...     model(torch.randn(1, 3, 8, 8), timestep=500).sample.shape
        torch.Size([1, 3, 8, 8])
        >>> recipe.order
        ['knight', 'watercolour']
    """

    method_name: ClassVar[str] = "cached_lora"
    trainable: ClassVar[bool] = False
    exportable: ClassVar[str] = "no"  # the adapters take turns

    adapters: dict[str, str | None] | list[str] | None = option(
        None,
        "Path or Hub id of each LoRA by adapter name; a list of names if they are loaded already; None: all LoRAs on "
        "the denoiser.",
    )
    method: str = option("cmlora", "merge, merge_normalized (equal norms), switch, w_switch, composite or cmlora.")
    weights: dict[str, float] | list[float] | None = option(
        None, "Factor on the scale of each adapter; for w_switch its share of the steps. None: 1."
    )
    order: list[str] | str = option(
        "given", "Order in which adapters take turns: a list of names, 'given' (as in adapters), or 'profile'."
    )
    high: list[str] | None = option(None, "Adapters that dominate early; None: by profile, or all not in low.")
    low: list[str] | None = option(None, "Adapters that dominate late; None: by profile, or all not in high.")
    phase_border: float = option(0.545, "cmlora: share of the steps after which low dominates instead of high.")
    switch_every: int = option(5, "Steps per turn of switch; mean steps per turn of w_switch.")
    dominance_init: float | None = option(
        None, "cmlora: first ratio c of the largest weight to the others; None: N - 0.5."
    )
    dominance_decay: float = option(0.5, "cmlora: base d of the decrement d**k of c at the k-th change of dominance.")
    dominance_floor: float = option(1.0, "cmlora: lower bound of c; at 1 all adapters weigh equal.")
    cache: bool = option(True, "cmlora: adapters that do not dominate reuse their own deep features.")
    cache_early: int = option(2, "cmlora: steps between refreshes before the first and after the second cache border.")
    cache_middle: int = option(3, "cmlora: steps between refreshes between the two cache borders.")
    cache_borders: tuple[float, float] = option(
        (0.375, 0.875), "cmlora: the two cache borders, as shares of the steps."
    )
    max_age: int = option(10, "cmlora: largest age in steps of a feature that is reused; 0 recomputes all features.")
    batched: bool = option(False, "Run the passes of one step as one mixed batch of peft instead of in a loop.")
    profile: dict[str, float] | None = option(
        None, "Measured share of high frequencies of each adapter, from profile_frequency."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._name_adapters()
        for name, (is_valid, fix) in RULES.items():
            self.require(is_valid(getattr(self, name)), name, fix)
        fix = "measure it with profile_frequency() and store() it in the recipe"
        self.require(self.order != "profile" or bool(self.profile), "order", fix)
        self._convert_numbers()
        if self.adapters:
            self.roles(list(self.adapters))

    @property
    def sources(self) -> dict[str, str | None]:
        """Path or Hub id of each adapter that the recipe names; None for adapters that are loaded already."""
        return dict(self.adapters) if isinstance(self.adapters, dict) else {}

    def _name_adapters(self) -> None:
        """Turns lists into dicts by adapter name; `order` keeps their order because peft sorts the keys it saves."""
        given = self.adapters
        self.require(given is None or isinstance(given, (dict, list)), "adapters", "use a dict, a list or None")
        if isinstance(given, list):
            self.require(all(isinstance(name, str) for name in given), "adapters", "use a list of names (str)")
            self.require(len(set(given)) == len(given), "adapters", "name each adapter once")
            self.adapters = given = dict.fromkeys(given)
        names = list(given or ())
        named = all(isinstance(name, str) and NAME.fullmatch(name) for name in names)
        fix = "use names of 1 to 64 letters, digits, '_' and '-'"
        self.require(given is None or (isinstance(given, dict) and named), "adapters", fix)
        self.require(given is None or bool(given), "adapters", "name one, or use None for all that are loaded")
        located = all(source is None or (isinstance(source, str) and source) for source in self.sources.values())
        self.require(located, "adapters", "use a path or Hub id (str) for each adapter, or None if it is loaded")
        if isinstance(self.weights, list):
            fix = "give one weight for each of adapters, or a dict by name"
            self.require(len(self.weights) == len(names), "weights", fix)
            self.weights = dict(zip(names, self.weights, strict=True))
        if self.order == "given" and names:
            self.order = names

    def _convert_numbers(self) -> None:
        """Converts numpy scalars to float and the list that JSON holds to a tuple."""
        for name in ("phase_border", "dominance_init", "dominance_decay", "dominance_floor"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else float(value))
        for name in ("weights", "profile"):
            values = getattr(self, name)
            setattr(self, name, values and {key: float(value) for key, value in values.items()})
        self.cache_borders = (float(self.cache_borders[0]), float(self.cache_borders[1]))

    def roles(self, available: Sequence[str]) -> Roles:
        """Resolves the recipe for the names of the LoRAs on a denoiser.

        Raises a ValueError if it names a missing adapter, repeats a name, or omits one from `order` or `profile`.
        """
        names = list(self.adapters or available)
        self._check_names("adapters", names, available)
        order = names if self.order == "given" else self.order
        if order == "profile":
            shares = self.profile or {}
            self._check_names("profile", shares, names, complete=True)
            order = sorted(names, key=lambda name: -shares[name])
        self._check_names("order", order, names, complete=True)
        high, low = self._phases(list(order))
        given: Any = self.weights or {}
        weights = dict.fromkeys(names, 1.0) | given
        self._check_names("weights", weights, names)
        fix = "w_switch shares out the steps: use weights of at least 0, not all of them 0"
        enough = self.method != "w_switch" or (min(weights.values()) >= 0 and sum(weights.values()) > 0)
        self.require(enough, "weights", fix)
        return Roles(tuple(order), high, low, weights)

    def _phases(self, order: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Returns the adapters that may dominate early and late, in the order of turns; an empty set becomes all."""
        high, low = self.high, self.low
        if high is None and low is None and self.order == "profile":
            high, low = split_at_largest_gap(self.profile or {})
        self._check_names("high", high or (), order)
        self._check_names("low", low or (), order)
        if high is None:
            taken = set(low or ())
            high = [name for name in order if name not in taken]
        early = set(high)
        if low is None:
            low = [name for name in order if name not in early]
        late = set(low)
        if early & late or early | late != set(order):
            raise ValueError(
                f"CachedLoraConfig: high={_shown(high)} and low={_shown(low)} cannot be used; each adapter of "
                f"{_shown(order)} must be in exactly one of the two. Leave one field out to give it the "
                "remaining adapters."
            )
        return tuple(n for n in order if n in early or not early), tuple(n for n in order if n in late or not late)

    def _check_names(self, field: str, names: Iterable[str], known: Sequence[str], complete: bool = False) -> None:
        """Raises a ValueError unless `names` are distinct and in `known`, and, if `complete`, are all of `known`."""
        names, existing = list(names), set(known)
        given = set(names)
        unknown = [name for name in names if name not in existing]
        missing = [name for name in known if name not in given] if complete else []
        if unknown or missing or len(given) < len(names):
            problem = f"there is no adapter {_shown(unknown)}" if unknown else f"{_shown(missing)} is left out"
            problem = problem if unknown or missing else "a name occurs twice"
            raise ValueError(
                f"CachedLoraConfig: {field}={_shown(names)} cannot be used; {problem}. The adapters are "
                f"{_shown(list(known))}."
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Loads as peft does; invalid JSON, unknown fields and links out of the folder are a ValueError."""
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if folder.is_dir():
            known = {item.name for item in fields(cls)} | {"runtime_config"}
            odd = [
                name for name, value in read_json(folder / CONFIG_NAME, folder).items() if value and name not in known
            ]
            if odd:
                close = difflib.get_close_matches(odd[0], known, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise ValueError(f"CachedLoraConfig: unknown field {odd[0]!r}: {hint}Remove it from {folder}.")
            if os.path.lexists(folder / WEIGHTS_NAME):
                raise ValueError(f"{folder / WEIGHTS_NAME} is a pickle, which can run code; remove it from the recipe.")
            weights = folder / SAFETENSORS_WEIGHTS_NAME
            if os.path.lexists(weights):
                with TensorFile(weights, folder) as file:
                    if file.tensors:
                        raise ValueError(f"{weights} has tensors, which a recipe has not; save the recipe again.")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"CachedLoraConfig cannot be made of the fields in the file: {error}.") from error

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves as peft does, plus a weights file without tensors, because `PeftModel.from_pretrained` requires one.

        The recipe that the folder had is replaced at once.
        """
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"save_directory={str(folder)!r} is not a folder; give the name of one.")
        weights = folder / SAFETENSORS_WEIGHTS_NAME
        if not weights.exists():
            with replaced_file(weights) as draft:
                save_file({}, draft, metadata={"format": "pt"})
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as work:
            super().save_pretrained(work, **kwargs)
            with replaced_file(folder / CONFIG_NAME) as draft:
                Path(work, CONFIG_NAME).replace(draft)


def split_at_largest_gap(shares: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Splits names into those with a high and those with a low share, each in falling order; one name alone is high."""
    order = sorted(shares, key=lambda name: -shares[name])
    gaps = [shares[one] - shares[other] for one, other in itertools.pairwise(order)]
    cut = 1 + gaps.index(max(gaps)) if gaps else 1
    return order[:cut], order[cut:]


def _shown(names: Sequence[str]) -> str:
    """Returns names for a message, of many the first ones."""
    more = f" (and {len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return f"{list(names[:SHOWN])}{more}"


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def _is_number_dict(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(is_number(v) and abs(float(v)) <= LARGEST for v in value.values())
    )


def _is_borders(value: Any) -> bool:
    pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_number, value))
    return pair and 0 <= value[0] <= value[1] <= 1


def _in_range(least: float, below: float) -> Callable[[Any], bool]:
    return lambda value: is_number(value) and least <= value < below


_NAMES = (lambda value: value is None or _is_names(value), "use a list of adapter names or None")
_COUNT = (lambda value: type(value) is int and 0 < value <= LARGEST, f"use an int from 1 to {LARGEST}")
_FLAG = (lambda value: type(value) is bool, "use True or False")
#: Whether a value of a field is valid, and how to fix one that is not.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "method": (lambda value: value in METHODS, f"use one of {', '.join(METHODS)}"),
    "order": (
        lambda value: value in ("given", "profile") or (_is_names(value) and len(value) > 0),
        "use 'given', 'profile' or a list of adapter names",
    ),
    "high": _NAMES,
    "low": _NAMES,
    "weights": (_is_number_dict, "use a number for each adapter; for scales by block call pipe.set_adapters()"),
    "profile": (_is_number_dict, "use a dict with a number for each adapter"),
    "switch_every": _COUNT,
    "cache_early": _COUNT,
    "cache_middle": _COUNT,
    "max_age": (lambda value: type(value) is int and value >= 0, "use an int of at least 0"),
    "cache": _FLAG,
    "batched": _FLAG,
    "cache_borders": (_is_borders, "use two shares from 0 to 1, the smaller one first"),
    "phase_border": (_in_range(0, math.nextafter(1, 2)), "use a share from 0 to 1"),
    "dominance_decay": (_in_range(0, 1), "use a number from 0 to below 1"),
    "dominance_floor": (_in_range(0, math.inf), "use a number of at least 0"),
    "dominance_init": (
        lambda value: value is None or _in_range(math.nextafter(0, 1), math.inf)(value),
        "use a positive number or None",
    ),
}
