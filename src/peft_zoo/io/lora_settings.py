r"""Reads rank and scale of every module from an untrusted LoRA configuration.

peft uses the keys of `rank_pattern` and `alpha_pattern` as regular expressions, `re.match(rf"(.*\.)?({key})$", name)`,
and takes the first match. An expression from a file can take exponential time, so here a key is read as a name: a whole
module name or its end after a dot; with a leading `^` a whole name only. Escapes of `re.escape` and a final `$` are
removed, and a dot is a dot. Keys with any other special character are refused.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from peft_zoo.io.lora_ranks import CHANGES_BASE
from peft_zoo.io.strict_json import parse_json
from peft_zoo.registration import methods

MAX_RANK = 1 << 16
DIFFUSERS_METADATA = "lora_adapter_metadata"  # metadata entry with the configurations of each model part

# Fields `use_…` and `…_config` of peft's LoraConfig with which the update is s B A on the whole input, or that only
# matter before training. All others are refused, so fields of future versions are refused too.
_ALLOWED = {
    "use_rslora",
    "use_dora",  # the magnitude vector is a tensor of its own
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "runtime_config",
}
_REFUSED = ("layer_replication", "target_parameters", "ensure_weight_tying")

#: Fields of a LoRA without which an update would have another value; those that old versions of peft lack last.
NEEDED = ("r", "lora_alpha")
NEEDED_OF_VERSION = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")

_SPECIAL = frozenset("*+?()[]{}|^$")

T = TypeVar("T", int, float)


@dataclass(frozen=True)
class Patterns(Generic[T]):
    """Parsed `rank_pattern` or `alpha_pattern`: the position and value of each key, by whole name or end of a name."""

    whole: dict[str, tuple[int, T]] = field(default_factory=dict)
    ends: dict[str, tuple[int, T]] = field(default_factory=dict)

    def of(self, module: str, default: T) -> T:
        """Value of the first key that matches a module name, or the default."""
        matches = [self.whole[module]] if module in self.whole else []
        parts = module.split(".")
        for start in range(len(parts)):
            end = ".".join(parts[start:])
            matches += [self.ends[end]] if end in self.ends else []
        return min(matches)[1] if matches else default


class ModuleSettings(NamedTuple):
    """Rank, alpha and scale s of one module's update `s * B A`."""

    rank: int
    alpha: float
    scale: float


@dataclass(frozen=True)
class LoraSettings:
    """Fields of a LoRA configuration that determine ranks and scales."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Patterns[int]
    alpha_pattern: Patterns[float]

    def of(self, module: str) -> ModuleSettings:
        """Rank, alpha and scale of a module, by its name in the base model."""
        name = module.partition(".base_layer.")[0]  # out_proj in an attention layer has the settings of that layer
        rank, alpha = self.rank_pattern.of(name, self.rank), self.alpha_pattern.of(name, self.alpha)
        return ModuleSettings(rank, alpha, alpha / (math.sqrt(rank) if self.rslora else rank))


def read_settings(config: Mapping[str, Any]) -> LoraSettings:
    """Validates an `adapter_config.json` of a LoRA and extracts the fields that determine ranks and scales.

    Other adapter types, and updates other than `s * B A` on the whole input, are a NotImplementedError.
    """
    _check_kind(config)
    check_names(config)
    check_present(config, needed_fields(config))
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
    """Reads ranks and scales from the metadata of a file written by diffusers.

    One JSON object holds the configurations of all model parts, with prefixed fields: `unet.r`, `text_encoder.r`. A
    file with a single part may omit the prefix. Returns a function from the full name of a module to its settings; None
    for modules that the metadata does not configure.
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


def needed_fields(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the fields that a LoRA's `adapter_config.json` must have: more if a version of peft is recorded in it."""
    return NEEDED + (NEEDED_OF_VERSION if config.get("peft_version") else ())


def check_present(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises a ValueError for a field that a configuration lacks: its default may not be what was trained with."""
    missing = [name for name in names if name not in config]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(
            f"{missing[0]!r}{more} is missing in adapter_config.json, and a default could differ from the value that "
            "the adapter was trained with; write the value into the file, or get the file again."
        )


def check_names(config: Mapping[str, Any]) -> None:
    """Raises a ValueError for a field of names that is no list of texts, or no text where peft takes one.

    So does `trainable_token_indices` that are neither a list of integers nor such lists by name.
    """
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "target_parameters"):
        value = config.get(name)
        listed = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(each, str) for each in listed):
            raise ValueError(f"{name}={reprlib.repr(value)}: write a list of module names.")
        if isinstance(value, str) and name in ("modules_to_save", "target_parameters"):
            raise ValueError(f"{name}={reprlib.repr(value)}: write a list of names, also of one.")
    tokens = config.get("alora_invocation_tokens")
    if tokens is not None and not (isinstance(tokens, list) and all(type(token) is int for token in tokens)):
        raise ValueError(f"alora_invocation_tokens={reprlib.repr(tokens)}: write a list of integers.")
    tokens = config.get("trainable_token_indices")
    lists = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
    if tokens is not None and not all(isinstance(t, list) and all(type(i) is int for i in t) for t in lists):
        raise ValueError(f"trainable_token_indices={reprlib.repr(tokens)}: write a list of integers, or one by name.")


def check_targeted(config: Mapping[str, Any], modules: Iterable[str]) -> None:
    """Raises a ValueError for a module with tensors that the configuration's lists of names do not choose.

    peft would not adapt it, and ignore its tensors. Nothing is checked where a field is a regular expression.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if not isinstance(targets, list) or not isinstance(excluded, list):
        return
    for name in modules:
        parts = name.partition(".base_layer.")[0].split(".")
        ends = {".".join(parts[start:]) for start in range(len(parts))}
        if ends.isdisjoint(targets) or not ends.isdisjoint(excluded):
            raise ValueError(f"target_modules={reprlib.repr(targets)}: the weights file has tensors of {name!r}.")


def _check_kind(config: Mapping[str, Any]) -> None:
    """Checks that every update is `s * B A`, added to base weights that do not depend on the rank."""
    kind = config.get("peft_type")
    kinds = ["LORA", *(method.peft_type for method in methods().values() if method.saves_plain_lora)]
    if kind not in kinds:
        raise NotImplementedError(f"peft_type={reprlib.repr(kind)}: use a file of type {' or '.join(kinds)}.")
    for name, value in config.items():
        is_switch = name.startswith("use_") or name.endswith("_config")
        if value and (name in _REFUSED or (is_switch and name not in _ALLOWED)):
            raise NotImplementedError(
                f"{reprlib.repr(name)}={reprlib.repr(value)}: not supported; use a LoRA with updates s * B A."
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise ValueError(
            f"init_lora_weights={reprlib.repr(start)} changed the base weights by an amount that depends on the rank; "
            "save with save_pretrained(..., path_initial_model_for_weight_conversion=...), or, if the changed base "
            "model was saved, set init_lora_weights to true."
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
    """Parses and validates a pattern field of a configuration."""
    entries = config.get(name) or {}
    if not isinstance(entries, dict):
        raise ValueError(f"{name}={reprlib.repr(entries)}: give an object with the names of modules.")
    patterns: Patterns[T] = Patterns()
    for place, (key, value) in enumerate(entries.items()):
        shown = f"{name}[{reprlib.repr(key)}]"
        target = patterns.whole if key.startswith("^") else patterns.ends
        target.setdefault(_module_name(shown, key), (place, check(shown, value)))
    return patterns


def _module_name(shown: str, key: str) -> str:
    """Module name (or end of a name) that a pattern key matches; `shown` names the key in the error."""
    letters = iter(key.removeprefix("^").removeprefix(r".*\.").removesuffix("$"))
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
