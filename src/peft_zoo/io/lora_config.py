"""The configuration of a plain LoRA that a tool made of an adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig

from peft_zoo.io.lora_file import CONFIG_NAME
from peft_zoo.io.lora_ranks import RankAndScale, rank_fields

HOW_IT_BEGAN = ("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
"""Fields of a configuration that no longer matter; peft warns of some where they do not fit the others."""


def keeps_rslora(modules: Mapping[str, RankAndScale]) -> bool:
    """Whether rsLoRA's rule can go on to describe the scales: with one rank, and not where all scales are folded."""
    return len({module.rank for module in modules.values()}) == 1 and {m.scale for m in modules.values()} != {1.0}


def write_config(
    folder: Path, old: Mapping[str, Any], modules: Mapping[str, RankAndScale], before: Iterable[str]
) -> None:
    """Write the configuration of a plain LoRA that was made of an adapter.

    Args:
        folder: Where it goes.
        old: The content of the adapter's `adapter_config.json`.
        modules: Rank and scale of those that are left.
        before: Names of all that there were.
    """
    known = {item.name for item in fields(LoraConfig)} | {"peft_version"}
    is_lora = old.get("peft_type") == "LORA"
    new = {name: value for name, value in old.items() if name not in HOW_IT_BEGAN and (name in known or is_lora)}
    rslora = bool(old.get("use_rslora")) and keeps_rslora(modules)
    new |= {"peft_type": "LORA", "use_rslora": rslora, **rank_fields(modules, rslora), **target_fields(modules, before)}
    (folder / CONFIG_NAME).write_text(json.dumps(new, indent=2, sort_keys=True), encoding="utf-8")


def target_fields(modules: Iterable[str], before: Iterable[str]) -> dict[str, Any]:
    """What makes peft adapt the modules that are left and no others. It takes a name in a list for an end of names."""
    left = sorted(modules)
    dropped = set(before).difference(left)
    if not dropped:
        return {}
    if not any(name.endswith(tuple(f".{end}" for end in left)) for name in dropped):
        return {"target_modules": left}
    exactly = "|".join(re.escape(name) for name in left)
    return {"target_modules": exactly, "layers_to_transform": None, "layers_pattern": None}
