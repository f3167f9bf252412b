"""The LoRAs that are combined: their modules by name, and the update of each adapter in a module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from peft_zoo.io import LoraAdapter, open_adapter
from peft_zoo.io.expert_names import check_plain_names
from peft_zoo.kernels.combining.products import Product
from peft_zoo.merge.base.plain_lora import Module, check_drop, drops, file_extras, file_modules


@dataclass(frozen=True)
class Sources:
    """Open LoRAs of one model, in one format.

    Attributes:
        adapters: The open files.
        names: What messages call them.
        modules: Modules that at least one adapter changes, by name, without those that are dropped.
        dropped: Names of modules and kinds of tensors that are left out.
        notes: What a user of the result should know.
    """

    adapters: tuple[LoraAdapter, ...]
    names: tuple[str, ...]
    modules: dict[str, Module]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def format(self) -> str:
        """Key format of all files."""
        return self.adapters[0].format

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether all modules are `Conv1D` layers of transformers."""
        return all(bool((adapter.config or {}).get("fan_in_fan_out", False)) for adapter in self.adapters)

    def ranks(self, module: str) -> tuple[int, ...]:
        """Returns the rank of each adapter in a module; 0 where it has none."""
        found = (adapter.modules.get(module) for adapter in self.adapters)
        return tuple(0 if part is None else part.rank for part in found)

    def dtypes(self, module: str) -> list[torch.dtype]:
        """Returns the dtypes of the adapters that have a module."""
        return [adapter.modules[module].dtype for adapter in self.adapters if module in adapter.modules]

    def updates(self, module: str) -> list[Product | None]:
        """Reads the update of each adapter in a module; None where it has none."""
        found: list[Product | None] = []
        for adapter in self.adapters:
            own = adapter.modules.get(module)
            found.append(None if own is None else Product(*adapter.factors(module), own.scale))
        return found


@contextmanager
def open_sources(paths: Sequence[str | Path], drop: Sequence[str]) -> Iterator[Sources]:
    """Opens LoRAs and checks that they belong to one model, and that a LoRA can hold their combination."""
    if isinstance(paths, (str, Path)) or not paths:
        raise ValueError(f"adapters={paths!r}: give a list of folders or files.")
    names = _names(paths)
    with ExitStack() as stack:
        adapters = tuple(stack.enter_context(open_adapter(path)) for path in paths)
        formats = {adapter.format: name for adapter, name in zip(adapters, names, strict=True)}
        if len(formats) > 1:
            (one, first), (other, second) = list(formats.items())[:2]
            raise ValueError(f"adapters={[first, second]!r} are in the formats {one} and {other}; convert one first.")
        modules, dropped = _modules(adapters, names, drop)
        check_plain_names(modules, adapters[0].config)
        yield Sources(adapters, names, modules, dropped, _notes(adapters))


def _names(paths: Sequence[str | Path]) -> tuple[str, ...]:
    """Returns short names, whole paths where two are equal."""
    short = [Path(path).name for path in paths]
    return tuple(name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True))


def _modules(
    adapters: Sequence[LoraAdapter], names: Sequence[str], drop: Sequence[str]
) -> tuple[dict[str, Module], tuple[str, ...]]:
    """Returns the modules of all adapters, and what is left out."""
    found: dict[str, Module] = {}
    extra_keys: dict[str, str] = {}
    for adapter, name in zip(adapters, names, strict=True):
        if adapter.config is None and adapter.other_keys:
            raise ValueError(
                f"{name}: {adapter.other_keys[0]!r} is no part of a LoRA and cannot be combined; remove it."
            )
        extra_keys = {**file_extras(adapter, adapter.config or {})[0], **extra_keys}
        for module, own in file_modules(adapter).items():
            known = found.setdefault(module, own)
            sizes = next(a.modules[module].sizes for a in adapters if module in a.modules)
            if (known.kind, known.inner, sizes) != (own.kind, own.inner, adapter.modules[module].sizes):
                raise ValueError(
                    f"{module}: {name!r} has a {own.kind} layer of {adapter.modules[module].sizes}, another adapter a "
                    f"{known.kind} layer of {sizes}; combine adapters of one base model."
                )
    check_drop(drop, found, extra_keys)
    kept = {module: own for module, own in found.items() if not drops(module, drop)}
    return kept, tuple(sorted({*extra_keys, *(found.keys() - kept.keys())}))


def _notes(adapters: Sequence[LoraAdapter]) -> tuple[str, ...]:
    """Returns what a user should know of the combination."""
    notes = [note for adapter in adapters for note in file_extras(adapter, adapter.config or {})[1]]
    bases = {
        str(config["base_model_name_or_path"])
        for a in adapters
        if (config := a.config or {}).get("base_model_name_or_path")
    }
    if len(bases) > 1:
        notes.append(f"the adapters name different base models: {', '.join(sorted(bases))}")
    return tuple(dict.fromkeys(notes))
