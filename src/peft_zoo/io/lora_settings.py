r"""What a LoRA's configuration says of rank and scale, and whether its update is a plain product at all.

peft reads the keys of `rank_pattern` and `alpha_pattern` as regular expressions, `re.match(rf"(.*\.)?({key})$", name)`,
and takes the first that fits. An expression from a file can keep a machine busy for years, so here a key is a name: the
whole name of a module, or its end after a dot; with `^` before it only the whole. Escapes as `re.escape` makes them and
a `$` at the end are undone, and a dot is a dot. A key that is more of an expression than that is refused.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from peft_zoo.io.lora_ranks import CHANGES_BASE
from peft_zoo.io.safetensors import parse_json

MAX_RANK = 1 << 16
PEFT_TYPES = ("LORA", "ZOO_SQUEEZE_LORA")
DIFFUSERS_METADATA = "lora_adapter_metadata"  # where diffusers keeps the configurations of a file's parts

# Switches (`use_…`) and `…_config` of peft's LoraConfig that leave the update s B A on the whole input, or that only
# matter before training. All others are refused, and so are those that a later peft invents.
_HARMLESS = {
    "use_rslora",
    "use_dora",  # the magnitude vector is a tensor of its own
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "runtime_config",
}
_REFUSED = ("layer_replication", "target_parameters", "ensure_weight_tying")

_SPECIAL = frozenset("*+?()[]{}|^$")

T = TypeVar("T", int, float)


@dataclass(frozen=True)
class Patterns(Generic[T]):
    """A `rank_pattern` or `alpha_pattern` whose keys are names.

    Attributes:
        whole: Values by the whole name of a module, each with its place among the keys.
        ends: Values by the end of a name.
    """

    whole: dict[str, tuple[int, T]] = field(default_factory=dict)
    ends: dict[str, tuple[int, T]] = field(default_factory=dict)

    def of(self, module: str, default: T) -> T:
        """The value of the first key that fits the module."""
        fits = [self.whole[module]] if module in self.whole else []
        parts = module.split(".")
        for start in range(len(parts)):
            end = ".".join(parts[start:])
            fits += [self.ends[end]] if end in self.ends else []
        return min(fits)[1] if fits else default


class ModuleSettings(NamedTuple):
    """R, alpha and the factor s of one module's update s B A."""

    rank: int
    alpha: float
    scale: float


@dataclass(frozen=True)
class LoraSettings:
    """Rank and scale of every module, as a configuration gives them.

    Attributes:
        rank: `r`.
        alpha: `lora_alpha`.
        rslora: Whether the scale is alpha / sqrt(r) instead of alpha / r.
        rank_pattern: Modules with another rank.
        alpha_pattern: Modules with another alpha.
    """

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Patterns[int]
    alpha_pattern: Patterns[float]

    def of(self, module: str) -> ModuleSettings:
        """What the configuration gives one module, by its name in the model that was configured."""
        name = module.partition(".base_layer.")[0]  # a LoRA inside another's layer (attention) shares its settings
        rank, alpha = self.rank_pattern.of(name, self.rank), self.alpha_pattern.of(name, self.alpha)
        return ModuleSettings(rank, alpha, alpha / (math.sqrt(rank) if self.rslora else rank))


def read_settings(config: Mapping[str, Any]) -> LoraSettings:
    """Check a LoRA's configuration and keep what rank and scale depend on.

    Args:
        config: The content of an `adapter_config.json`.

    Raises:
        ValueError: If a value is impossible, or the file does not have what its base model lost when training began.
        NotImplementedError: If this is no LoRA, or one whose update is not s B A on the whole input.
    """
    _check_kind(config)
    rslora = config.get("use_rslora", False)
    if not isinstance(rslora, bool):
        raise ValueError(f"use_rslora={reprlib.repr(rslora)}: write true or false.")
    return LoraSettings(
        rank=_rank("r", config.get("r")),
        alpha=_alpha("lora_alpha", config.get("lora_alpha")),
        rslora=rslora,
        rank_pattern=_patterns("rank_pattern", config, _rank),
        alpha_pattern=_patterns("alpha_pattern", config, _alpha),
    )


def diffusers_settings(metadata: Mapping[str, str]) -> Callable[[str], ModuleSettings | None]:
    """Rank and scale by module, from the metadata of a file that diffusers wrote.

    It stores the configurations of its parts in one object with their fields prefixed, `unet.r`, `text_encoder.r`; a
    file with a single part may go without.

    Args:
        metadata: Of the safetensors file.

    Returns:
        A function from the full name of a module; it gives None where the metadata say nothing.

    Raises:
        ValueError: As `read_settings`, or if the entry is not a JSON object.
        NotImplementedError: As `read_settings`.
    """
    if DIFFUSERS_METADATA not in metadata:
        return lambda module: None
    try:
        fields = parse_json(metadata[DIFFUSERS_METADATA].encode("utf-8"))
    except ValueError as error:
        raise ValueError(f"metadata {DIFFUSERS_METADATA!r}: not valid JSON: {error}.") from error
    parts: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        part, dot, name_in_part = name.partition(".")
        parts.setdefault(part if dot else "", {})[name_in_part if dot else name] = value
    settings = {part: read_settings({"peft_type": "LORA", **config}) for part, config in parts.items()}

    def of(module: str) -> ModuleSettings | None:
        part, _, name = module.partition(".")
        if part in settings:
            return settings[part].of(name)
        return settings[""].of(module) if "" in settings else None

    return of


def _check_kind(config: Mapping[str, Any]) -> None:
    """Whether the update of every module is s B A, added to base weights that do not depend on the rank."""
    kind = config.get("peft_type")
    if kind not in PEFT_TYPES:
        raise NotImplementedError(f"peft_type={reprlib.repr(kind)}: only {' and '.join(PEFT_TYPES)} are read.")
    for name, value in config.items():
        is_switch = name.startswith("use_") or name.endswith("_config")
        if value and (name in _REFUSED or (is_switch and name not in _HARMLESS)):
            raise NotImplementedError(
                f"{reprlib.repr(name)}={reprlib.repr(value)}: only LoRAs whose update is a plain product are read."
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise ValueError(
            f"init_lora_weights={reprlib.repr(start)} takes from the base weights what depends on the rank; save with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), or, if the base model was saved after "
            "its change, set init_lora_weights to true."
        )


def _rank(name: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise ValueError(f"{name}={reprlib.repr(value)}: a rank is a whole number from 1 to {MAX_RANK}.")
    return value


def _alpha(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e300:
        raise ValueError(f"{name}={reprlib.repr(value)}: alpha is a finite number.")
    return float(value)


def _patterns(name: str, config: Mapping[str, Any], check: Callable[[str, object], T]) -> Patterns[T]:
    """The patterns in a field of a configuration, their values checked."""
    entries = config.get(name) or {}
    if not isinstance(entries, dict):
        raise ValueError(f"{name}={reprlib.repr(entries)}: give an object with the names of modules.")
    patterns: Patterns[T] = Patterns()
    for place, (key, value) in enumerate(entries.items()):
        shown = f"{name}[{reprlib.repr(key)}]"
        target = patterns.whole if key.startswith("^") else patterns.ends
        target.setdefault(_literal(shown, key), (place, check(shown, value)))
    return patterns


def _literal(shown: str, key: str) -> str:
    """The name that a key stands for.

    Raises:
        ValueError: If it stands for more than one.
    """
    letters = iter(key.removeprefix("^").removesuffix("$"))
    name = ""
    for letter in letters:
        escaped = letter == "\\"
        letter = next(letters, "") if escaped else letter
        if (escaped and (not letter or letter.isalnum())) or (not escaped and letter in _SPECIAL):
            raise ValueError(
                f"{shown}: regular expressions from a file are not run; save it with the names of modules as keys."
            )
        name += letter
    return name
