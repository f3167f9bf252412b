"""Reads and writes files of image and video LoRAs, whose formats differ in the names of modules and of tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_zoo.io import LoraAdapter, detect_format, open_adapter, read_json
from peft_zoo.io.lora_keys import is_lycoris
from peft_zoo.io.safetensors import TensorFile
from peft_zoo.merge.base.plain_lora import drops
from peft_zoo.merge.formats.format import ConvertOptions
from peft_zoo.merge.formats.fused import join, split, swap_halves
from peft_zoo.merge.formats.lora import Lora, Loras, check_extras, read_lora, write_folder, write_tensors
from peft_zoo.merge.formats.names.families import FAMILIES, Config, Part, family_of_config
from peft_zoo.merge.formats.names.match import Configs, Match, Place, match_names, names_of
from peft_zoo.merge.formats.names.table import Pair

HOLDS = ("magnitude",)
"""Entries of `plain_lora.EXTRAS` that these files can hold."""


def configs_of(options: ConvertOptions) -> Configs:
    """Returns the function that reads the configuration of each part from `base` or `config`."""
    found: dict[str, Config | None] = {}

    def of(part: Part, is_denoiser: bool) -> Config | None:
        if options.config is not None:
            return options.config if is_denoiser else None
        if part.name not in found:
            found[part.name] = _read_config(options.base, part.name, is_denoiser)
        return found[part.name]

    return of


def family_of(options: ConvertOptions) -> str | None:
    """Returns the family that is given, or that of the denoiser in `base` or `config`; None without these."""
    if options.family is not None or (options.base is None and options.config is None):
        return options.family
    config = options.config
    for part in ("unet", "transformer", ""):
        if config is None and options.base is not None and Path(options.base, part, "config.json").exists():
            config = read_json(Path(options.base, part, "config.json"), Path(options.base))
    if config is None:
        raise ValueError(f"base={str(options.base)!r} has no config.json; give the folder of a model or pipeline.")
    return family_of_config(config)


def _read_config(base: str | Path | None, part: str, is_denoiser: bool) -> dict[str, Any] | None:
    """Returns the configuration of a part in the folder of a pipeline, or of the denoiser alone; None without one."""
    if base is None:
        return None
    for folder in (Path(base, part), *([Path(base)] if is_denoiser else [])):
        if (folder / "config.json").exists():
            return read_json(folder / "config.json", Path(base))
    return None


def write_named(
    adapters: Mapping[str, LoraAdapter], target: Path, options: ConvertOptions, style: str, fmt: str
) -> list[str]:
    """Writes folders of peft as one file with the names of a style and the keys of a format of `lora_keys.FORMATS`."""
    found = match_parts(adapters, options, style)
    family = next(iter(found.values())).family if found else ""
    groups: list[Callable[[], dict[str, Tensor]]] = []
    for adapter, match in zip(adapters.values(), found.values(), strict=True):
        by_pair: dict[tuple[str, Pair], dict[int, str]] = {}
        for name, place in match.places.items():
            modules = by_pair.setdefault((place.part, place.pair), {})
            if modules.setdefault(place.index or 0, name) != name:
                raise ValueError(f"{name}: the adapter has this module under another name too; drop one.")
        parts = {part.name: part for part in FAMILIES[family]}
        for (part, pair), names in by_pair.items():
            file_name = next(names_of(parts[part], pair, style))[0]
            groups.append(_group(adapter, pair, names, file_name, fmt, options.drop))
    write_tensors(target, groups, {"format": "pt"})
    return []


def match_parts(adapters: Mapping[str, LoraAdapter], options: ConvertOptions, form: str) -> dict[str, Match]:
    """Returns what the modules of each adapter are, all of one family."""
    kept = {part: check_extras(adapter, options.drop, form, HOLDS) for part, adapter in adapters.items()}
    configs = configs_of(options)
    if "" in kept:
        return {"": match_names(kept[""], ["peft"], configs, family_of(options), options.part)}
    names = [f"{part}.{name}" for part, own in kept.items() for name in own]
    whole = match_names(names, ["diffusers"], configs, family_of(options))
    return {
        part: Match(whole.family, "peft", {name: whole.places[f"{part}.{name}"] for name in own})
        for part, own in kept.items()
    }


def _group(
    adapter: LoraAdapter, pair: Pair, names: Mapping[int, str], file_name: str, fmt: str, drop: Sequence[str]
) -> Callable[[], dict[str, Tensor]]:
    """Returns the function that computes the tensors of a module of the file."""

    def tensors() -> dict[str, Tensor]:
        count = len(pair.models)
        loras = [read_lora(adapter, names[index], drop) if index in names else None for index in range(count)]
        return _to_file(loras, pair, file_name).tensors(fmt, file_name)

    return tensors


def _to_file(loras: Sequence[Lora | None], pair: Pair, file_name: str) -> Lora:
    """Returns the LoRA of a module of the file."""
    present = [lora for lora in loras if lora is not None]
    if len(pair.models) > 1:
        index = next(i for i, lora in enumerate(loras) if lora is not None)
        shares = pair.shares or (1,) * len(pair.models)
        rows = pair.rows(len(present[0].B) * sum(shares) // shares[index])
        for model, lora, height in zip(pair.models, loras, rows, strict=True):
            if lora is not None and len(lora.B) != height:
                raise ValueError(f"{model}: has {len(lora.B)} rows instead of {height}; it is of another model.")
        try:
            return join(loras, rows)
        except NotImplementedError as error:
            raise NotImplementedError(f"{file_name} of {', '.join(pair.models)}: {error}.") from error
    return _swapped(present[0], pair)


def _swapped(lora: Lora, pair: Pair) -> Lora:
    """Returns the LoRA with exchanged halves of rows where the original code and diffusers order them differently."""
    if not pair.is_swapped(len(lora.B), lora.A[0].numel()):
        return lora
    magnitude = None if lora.magnitude is None else swap_halves(lora.magnitude)
    return replace(lora, B=swap_halves(lora.B), magnitude=magnitude)


def read_named(path: Path, folder: Path, options: ConvertOptions, styles: Collection[str]) -> list[str]:
    """Writes a folder of peft for each part of a file whose names follow one of the styles."""
    with open_adapter(path) as adapter:
        kept = kept_modules(adapter, options.drop)
        match = match_names(kept, styles, configs_of(options), family_of(options))
        parts: dict[str, dict[str, Callable[[], Lora]]] = {}
        sources: dict[tuple[str, str], str] = {}
        for name, place in match.places.items():
            for model, make in _from_file(adapter, name, place, options.drop).items():
                if sources.setdefault((place.part, model), name) != name:
                    raise ValueError(f"{name} and {sources[place.part, model]} are both {model} of {place.part}.")
                parts.setdefault(place.part, {})[model] = make
        write_parts(folder, parts)
    return []


def write_parts(folder: Path, parts: Mapping[str, Loras]) -> None:
    """Writes a folder of peft for each part: the folder itself if there is one part."""
    for part, loras in parts.items():
        write_folder(folder / part if len(parts) > 1 else folder, loras)


def kept_modules(adapter: LoraAdapter, drop: Sequence[str]) -> list[str]:
    """Returns the modules of a file that are kept; raises a NotImplementedError for tensors that are no LoRA."""
    for key in adapter.other_keys:
        if not any(key.endswith(end) for end in drop):
            ending = "." + key.rpartition(".")[2]
            raise NotImplementedError(
                f"{key}: a changed weight or bias is no LoRA, and a folder of peft cannot hold it; pass "
                f"drop=[{ending!r}] to leave it out."
            )
    kept = [name for name in adapter.modules if not drops(name, drop)]
    if not kept:
        raise ValueError(f"drop={list(drop)!r} leaves no module; leave some out of it.")
    return kept


def _from_file(adapter: LoraAdapter, name: str, place: Place, drop: Sequence[str]) -> dict[str, Callable[[], Lora]]:
    """Returns the LoRAs of the modules that a module of the file stands for, by name; reads B once to see which."""
    pair = place.pair
    if place.index is not None:  # diffusers has the modules of the model
        return {pair.models[place.index]: lambda: read_module(adapter, name, drop)}
    if len(pair.models) == 1:
        return {pair.models[0]: lambda: _swapped(read_module(adapter, name, drop), pair)}
    lora = read_module(adapter, name, drop)
    pieces = split(lora, pair.rows(len(lora.B)))

    return {pair.models[index]: _piece(adapter, name, pair, index, drop) for index, each in enumerate(pieces) if each}


def _piece(adapter: LoraAdapter, name: str, pair: Pair, index: int, drop: Sequence[str]) -> Callable[[], Lora]:
    """Returns the function that reads the LoRA of one of the modules of a pair."""

    def piece() -> Lora:
        lora = read_module(adapter, name, drop)
        found = split(lora, pair.rows(len(lora.B)))[index]
        if found is None:
            raise ValueError(f"{name}: the file has changed while it was read; convert again.")
        return found

    return piece


def read_module(adapter: LoraAdapter, name: str, drop: Sequence[str]) -> Lora:
    """Reads the LoRA of a module of a file; a ValueError if its magnitudes are by columns, which peft lacks."""
    lora = read_lora(adapter, name, drop)
    if lora.magnitude is None:
        return lora
    key = next(key for key in adapter.modules[name].keys.values() if key.endswith(("dora_scale", "magnitude_vector")))
    shape = adapter.file.tensors[key].shape
    if len(lora.magnitude) != len(lora.B) or (len(shape) > 1 and shape[0] == 1 and lora.A.dim() == 2):
        raise NotImplementedError(f"{key}: magnitudes {tuple(shape)} by columns; peft has them by rows, train so.")
    return lora


def owns(path: Path, formats: Collection[str], prefixes: Sequence[str] | None) -> bool:
    """Whether a file has keys of a format of `lora_keys.FORMATS`, and names of modules that begin with one of these.

    Without prefixes, whether none of the beginnings of other formats occurs.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with TensorFile(path) as file:
        if is_lycoris(file.tensors):
            return False
        try:
            fmt = detect_format(file.tensors)
        except ValueError:
            return False
        return fmt in formats and any(key.startswith(tuple(prefixes or ("",))) for key in file.tensors)
