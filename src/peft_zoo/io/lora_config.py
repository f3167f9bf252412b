"""Writes the configuration of a plain LoRA that was converted or compressed from another adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig

from peft_zoo.io.digest import DIGEST
from peft_zoo.io.expert_names import check_plain_names, is_expert
from peft_zoo.io.lora_file import CONFIG_NAME
from peft_zoo.io.lora_ranks import RankAndScale, rank_fields

INITIALIZATION_FIELDS = ("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
"""Fields that only affect new factors; peft warns about some of them if they contradict others."""


def keeps_rslora(modules: Mapping[str, RankAndScale]) -> bool:
    """Whether `use_rslora=True` may stay: all ranks are equal, and the scales are not all folded to 1."""
    return len({module.rank for module in modules.values()}) == 1 and {m.scale for m in modules.values()} != {1.0}


def write_config(
    folder: Path,
    old: Mapping[str, Any],
    modules: Mapping[str, RankAndScale],
    before: Iterable[str],
    default: str | None = None,
    stacked: Collection[str] = (),
) -> None:
    """Writes `adapter_config.json` of a plain LoRA; the arguments are those of `plain_config`."""
    new = plain_config(old, modules, before, default, stacked)
    (folder / CONFIG_NAME).write_text(json.dumps(new, indent=2, sort_keys=True), encoding="utf-8")


def plain_config(
    old: Mapping[str, Any],
    modules: Mapping[str, RankAndScale],
    before: Iterable[str],
    default: str | None = None,
    stacked: Collection[str] = (),
) -> dict[str, Any]:
    """Returns the configuration of a plain LoRA with these ranks and scales by module.

    `old` is the content of the source adapter's file, and `before` are the names of all its modules. The rank and alpha
    of routed experts are the defaults, since peft ignores patterns for them; else those of the module `default`, or the
    most common ones. `stacked` are the owners of single parameters, which `target_parameters` of `old` names; their
    ranks and scales are those of `default`.
    """
    default = next((name for name in modules if is_expert(name)), default)
    check_plain_names(modules, old)
    layers = {name: plan for name, plan in modules.items() if name not in stacked}
    ranked = {name: plan for name, plan in modules.items() if name in layers or name == default}
    known = {item.name for item in fields(LoraConfig)} | {"peft_version"}
    is_lora = old.get("peft_type") == "LORA"
    new = {
        k: value for k, value in old.items() if k not in (*INITIALIZATION_FIELDS, DIGEST) and (k in known or is_lora)
    }
    rslora = bool(old.get("use_rslora")) and keeps_rslora(modules)
    return new | {
        "peft_type": "LORA",
        "use_rslora": rslora,
        **rank_fields(ranked, rslora, default),
        **target_fields(layers, [name for name in before if name not in stacked]),
    }


def target_fields(modules: Iterable[str], before: Iterable[str]) -> dict[str, Any]:
    """Fields that make peft adapt exactly `modules`: their whole names, whatever the source's fields meant.

    `before` are the names of all modules of the source adapter. peft matches a name in the list `target_modules` with
    the end of module names; where that would match a dropped module, a regular expression of whole names is used.
    """
    remaining = sorted({name.partition(".base_layer.")[0] for name in modules})
    ends = set(remaining)
    dropped = {name.partition(".base_layer.")[0] for name in before}.difference(remaining)
    others = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    if any(tail in ends for name in dropped for tail in _tails(name)):
        return {"target_modules": "|".join(re.escape(name) for name in remaining), **others}
    return {"target_modules": remaining, **others}


def _tails(name: str) -> Iterable[str]:
    """The ends of a module name after each dot."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(1, len(parts)))
