"""Files that pipelines of diffusers save: the names of peft after those of the part, and configurations as metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_zoo.io import LoraAdapter, open_adapter
from peft_zoo.io.lora_config import plain_config
from peft_zoo.io.lora_ranks import RankAndScale
from peft_zoo.io.lora_settings import DIFFUSERS_METADATA
from peft_zoo.merge.formats.format import PARTS, ConvertOptions, Format
from peft_zoo.merge.formats.lora import Lora, check_extras, plain_fields, read_lora, write_tensors
from peft_zoo.merge.formats.named import HOLDS, configs_of, family_of, kept_modules, owns, read_module, write_parts
from peft_zoo.merge.formats.names.match import match_names


def _write(adapters: Mapping[str, LoraAdapter], target: Path, options: ConvertOptions) -> list[str]:
    """Writes one file for all parts, with the rank and alpha of each module in its metadata."""
    groups: list[Callable[[], dict[str, Tensor]]] = []
    fields: dict[str, Any] = {}
    for part, adapter in adapters.items():
        kept = check_extras(adapter, options.drop, "diffusers", HOLDS)
        part = part or _part(kept, options)
        plans = {name: RankAndScale(adapter.modules[name].rank, adapter.modules[name].scale) for name in kept}
        use_dora = bool((adapter.config or {}).get("use_dora")) and "magnitude" not in options.drop
        config = plain_config(plain_fields(use_dora), plans, plans)
        fields |= {f"{part}.{name}": value for name, value in config.items()}
        groups += [_group(adapter, name, part, options.drop) for name in kept]
    metadata = {"format": "pt", DIFFUSERS_METADATA: json.dumps(fields, indent=2, sort_keys=True)}
    write_tensors(target, groups, metadata)
    return []


def _part(names: list[str], options: ConvertOptions) -> str:
    """Returns the part of a pipeline that modules belong to, by their names unless it is given."""
    if options.part is not None:
        return options.part
    match = match_names(names, ["peft"], configs_of(options), family_of(options))
    return next(iter(match.places.values())).part


def _group(adapter: LoraAdapter, name: str, part: str, drop: Sequence[str]) -> Callable[[], dict[str, Tensor]]:
    """Returns the function that reads the tensors of a module."""
    return lambda: read_lora(adapter, name, drop).tensors("diffusers_peft", f"{part}.{name}", alpha=False)


def _read(path: Path, folder: Path, options: ConvertOptions) -> list[str]:
    """Writes a folder of peft for each part."""
    with open_adapter(path) as adapter:
        parts: dict[str, dict[str, Callable[[], Lora]]] = {}
        for name in kept_modules(adapter, options.drop):
            part, _, module = name.partition(".")
            if part not in PARTS or not module:
                raise ValueError(f"{name}: begins with none of the parts {', '.join(PARTS)}; name the part in the key.")
            parts.setdefault(part, {})[module] = _reader(adapter, name, options.drop)
        write_parts(folder, parts)
    return []


def _reader(adapter: LoraAdapter, name: str, drop: Sequence[str]) -> Callable[[], Lora]:
    """Returns the function that reads the LoRA of a module."""
    return lambda: read_module(adapter, name, drop)


def _owns(path: Path) -> bool:
    """Whether a file has keys of diffusers, and names that begin with a part of a pipeline."""
    return owns(path, ("diffusers_peft", "diffusers"), tuple(f"{part}." for part in PARTS))


FORMAT = Format("diffusers", "pipelines of diffusers", ".safetensors", _write, _read, _owns)
