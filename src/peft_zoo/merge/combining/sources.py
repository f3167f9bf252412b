"""The LoRAs that are combined: their modules by name, and the update of each adapter in a module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_zoo.io import LoraAdapter
from peft_zoo.io.expert_names import check_plain_names
from peft_zoo.kernels.combining.products import Product
from peft_zoo.merge.base.plain_lora import Module, check_drop, drops, file_extras, file_modules
from peft_zoo.merge.combining.stacked import Stacked, check_equal_parameters, open_lora, split, weight_names


@dataclass(frozen=True)
class Sources:
    """Open LoRAs of one model, in one format.

    Attributes:
        adapters: The open files.
        names: What messages call them.
        modules: Modules that at least one adapter changes, by name, without those that are dropped.
        dropped: Names of modules and kinds of tensors that are left out.
        notes: What a user of the result should know.
        stacked: Modules whose factors are stacked, also those that are dropped.
    """

    adapters: tuple[LoraAdapter, ...]
    names: tuple[str, ...]
    modules: dict[str, Module]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    stacked: dict[str, Stacked] = field(default_factory=dict)

    @property
    def format(self) -> str:
        """Key format of all files."""
        return self.adapters[0].format

    @property
    def config(self) -> dict[str, Any]:
        """Fields of the first adapter, and `target_parameters` of any."""
        configs = [adapter.config or {} for adapter in self.adapters]
        parameters = next((found for config in configs if (found := config.get("target_parameters"))), None)
        return {**configs[0], "target_parameters": parameters}

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether all modules are `Conv1D` layers of transformers."""
        return all(bool((adapter.config or {}).get("fan_in_fan_out", False)) for adapter in self.adapters)

    def ranks(self, module: str) -> tuple[int, ...]:
        """Returns the rank of each adapter in a module; 0 where it has none."""
        found = (adapter.modules.get(module) for adapter in self.adapters)
        return tuple(0 if part is None else part.rank // self._experts(module) for part in found)

    def _experts(self, module: str) -> int:
        """Returns the number of experts of a module, 1 of a layer."""
        return self.stacked[module].experts if module in self.stacked else 1

    @property
    def all_modules(self) -> dict[str, Module]:
        """Modules that the result can have: those of `modules`, and all whose factors are stacked."""
        found = {name: own for adapter in self.adapters for name, own in file_modules(adapter).items()}
        more = {name: replace(found[name], experts=own.experts) for name, own in self.stacked.items()}
        return {**more, **self.modules}

    def dtypes(self, module: str) -> list[torch.dtype]:
        """Returns the dtypes of the adapters that have a module."""
        return [adapter.modules[module].dtype for adapter in self.adapters if module in adapter.modules]

    def updates(self, module: str) -> dict[str, list[Product | None]]:
        """Reads the update of each adapter in a module; None where it has none.

        The keys are the names of the weights: that of the module, or one for each expert of a stacked module.
        """
        experts = self.stacked[module].experts if module in self.stacked else None
        names = weight_names(module, experts)
        found: dict[str, list[Product | None]] = {name: [] for name in names}
        for adapter in self.adapters:
            own = adapter.modules.get(module)
            factors: list[tuple[Tensor, Tensor]] = []
            if own is not None:
                B, A = adapter.factors(module)
                factors = [(B, A)] if experts is None else split(B, A, experts)
            for index, name in enumerate(names):
                found[name].append(Product(*factors[index], own.scale) if own is not None else None)
        return found


@contextmanager
def open_sources(paths: Sequence[str | Path], drop: Sequence[str]) -> Iterator[Sources]:
    """Opens LoRAs and checks that they belong to one model, and that a LoRA can hold their combination."""
    if isinstance(paths, (str, Path)) or not paths:
        raise ValueError(f"adapters={paths!r}: give a list of folders or files.")
    names = _names(paths)
    with ExitStack() as stack:
        opened = [_entered(stack, path) for path in paths]
        adapters = tuple(adapter for adapter, _ in opened)
        stacked = {
            module: Stacked(count, adapter.modules[module].sizes)
            for adapter, own in opened
            for module, count in own.items()
        }
        check_equal_parameters(adapter.config or {} for adapter in adapters)
        formats = {adapter.format: name for adapter, name in zip(adapters, names, strict=True)}
        if len(formats) > 1:
            (one, first), (other, second) = list(formats.items())[:2]
            raise ValueError(
                f"adapters={[first, second]!r} are in the formats {one} and {other}; run peft-zoo convert first."
            )
        modules, dropped = _modules(opened, names, drop)
        check_plain_names(modules, adapters[0].config)
        yield Sources(adapters, names, modules, dropped, _notes(adapters), stacked)


def _entered(stack: ExitStack, path: str | Path) -> tuple[LoraAdapter, dict[str, int]]:
    """Opens an adapter that `stack` closes; returns it with its numbers of experts."""
    adapter, experts = open_lora(path)
    return stack.enter_context(adapter), experts


def _names(paths: Sequence[str | Path]) -> tuple[str, ...]:
    """Returns short names, whole paths where two are equal."""
    short = [Path(path).name for path in paths]
    return tuple(name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True))


def _modules(
    opened: Sequence[tuple[LoraAdapter, dict[str, int]]], names: Sequence[str], drop: Sequence[str]
) -> tuple[dict[str, Module], tuple[str, ...]]:
    """Returns the modules of all adapters, and what is left out."""
    found: dict[str, Module] = {}
    extra_keys: dict[str, str] = {}
    for (adapter, experts), name in zip(opened, names, strict=True):
        if adapter.config is None and adapter.other_keys:
            raise ValueError(
                f"{name}: {adapter.other_keys[0]!r} is no part of a LoRA and cannot be combined; remove it."
            )
        extra_keys = {**file_extras(adapter, adapter.config or {})[0], **extra_keys}
        for module, own in file_modules(adapter).items():
            own = replace(own, experts=experts.get(module))
            known = found.setdefault(module, own)
            sizes = next(a.modules[module].sizes for a, _ in opened if module in a.modules)
            own_kind = own.kind, own.inner, own.experts, adapter.modules[module].sizes
            if (known.kind, known.inner, known.experts, sizes) != own_kind:
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
