r"""LoRAs of parameters that stack the weights of E experts, which peft adapts by `target_parameters`.

Their factors are stacked too, in opposite orders::

    A (E r, n)    row e r + k       is row k of expert e
    B (m, r E)    column k E + e    is column k of expert e          Delta W_e = s B_e A_e,  s = alpha / r

A tensor's name has the module that owns the parameter, and `.base_layer` once for every further parameter of that
module which peft has wrapped after it, so the parameter itself is known only if the base model is. Therefore the
adapters need equal `target_parameters`, and the result has one rank for all experts, the default of the configuration.

They are read as ordinary LoRAs of rank E r, and split afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_zoo.io import LoraAdapter, open_adapter
from peft_zoo.io.lora_file import CONFIG_NAME, open_weights
from peft_zoo.io.lora_keys import Role, parse_key
from peft_zoo.io.lora_ranks import alpha_of
from peft_zoo.io.lora_settings import check_names, read_settings
from peft_zoo.io.safetensors import TensorFile
from peft_zoo.io.strict_json import read_json
from peft_zoo.merge.base.plain_lora import Factors

SWAPPED = (0, 19)
"""First version of peft that exchanges the axes of parameters `(E, m, n)`; before, A and B had each other's sizes."""


def open_lora(path: str | Path) -> tuple[LoraAdapter, dict[str, int]]:
    """Opens a LoRA as `open_adapter` does, and one with `target_parameters` as a LoRA of rank E r.

    Returns:
        The open adapter, and the number of experts of every module whose factors are stacked.
    """
    path = Path(path)
    config = read_json(path / CONFIG_NAME, path) if path.is_dir() else {}
    if not config.get("target_parameters"):
        return open_adapter(path), {}
    check_names(config)
    _check_version(config)
    file = open_weights(path, config)
    try:
        experts, fields = _as_plain(config, file)
        adapter = LoraAdapter(file, fields)
    except BaseException:
        file.close()
        raise
    adapter.config = config
    return adapter, experts


def split(B: Tensor, A: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """Returns the factors of each expert."""
    rank = len(A) // experts
    return list(zip(B.view(len(B), rank, experts).unbind(2), A.view(experts, rank, -1).unbind(0), strict=True))


def weight_names(module: str, experts: int | None) -> list[str]:
    """Returns the names of a module's weights: its own, or one for each expert."""
    return [module] if experts is None else [f"{module}[{index}]" for index in range(experts)]


@dataclass(frozen=True)
class Stacked:
    """A module with stacked factors.

    Attributes:
        experts: Number of experts.
        sizes: Rows and columns of each expert's update.
    """

    experts: int
    sizes: tuple[int, int]


class ByModule(Mapping[str, Factors]):
    """Factors by module, from those by weight: stacked ones are made when they are asked for."""

    def __init__(self, weights: Mapping[str, Factors], stacked: Mapping[str, Stacked]) -> None:
        """Takes factors by names of weights, of one rank and with scale 1 if they are stacked.

        Experts without factors have updates of zeros, and so have modules: if there is one of `stacked` modules, all
        are there, since the names of their tensors depend on each other.
        """
        self._weights, self._stacked = weights, stacked
        self._example = next((name for name in weights if _module_of(name) in stacked), None)
        self._names = [*dict.fromkeys(map(_module_of, weights)), *(stacked if self._example else ())]
        self._names = list(dict.fromkeys(self._names))

    def __getitem__(self, module: str) -> Factors:
        own = self._stacked.get(module)
        if own is None or self._example is None:
            return self._weights[module]
        example = self._weights[self._example].A
        none = Factors(example.new_zeros(own.sizes[0], len(example)), example.new_zeros(len(example), own.sizes[1]))
        found = [self._weights.get(name, none) for name in weight_names(module, own.experts)]
        return Factors(torch.stack([each.B for each in found], 2).flatten(1), torch.cat([each.A for each in found]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _module_of(weight: str) -> str:
    """Returns the module of a weight; names of modules have no brackets."""
    return weight.partition("[")[0]


def check_equal_parameters(configs: Iterable[Mapping[str, Any]]) -> None:
    """Raises a NotImplementedError if the adapters' `target_parameters` differ."""
    found = [sorted(set(parameters)) for config in configs if (parameters := config.get("target_parameters"))]
    other = next((parameters for parameters in found if parameters != found[0]), None)
    if other is not None:
        raise NotImplementedError(
            f"target_parameters={found[0]} and {other}: names of tensors depend on them; combine adapters that have "
            "equal ones."
        )


def _check_version(config: Mapping[str, Any]) -> None:
    numbers = re.findall(r"[0-9]+", str(config.get("peft_version"))[:20])
    if len(numbers) < 2 or (int(numbers[0]), int(numbers[1])) < SWAPPED:
        raise NotImplementedError(
            f"peft_version={config.get('peft_version')!r}: before {'.'.join(map(str, SWAPPED))} the factors of "
            "target_parameters had another layout; load the adapter with a newer peft and save it."
        )


def _as_plain(config: Mapping[str, Any], file: TensorFile) -> tuple[dict[str, int], dict[str, Any]]:
    """Returns the number of experts by module, and fields of a LoRA whose ranks are those of the stacked factors."""
    parameters: list[str] = config["target_parameters"]
    plain = {**config, "target_parameters": None}
    settings = read_settings(plain)
    experts: dict[str, int] = {}
    ranks, alphas = {}, {}
    for key, info in file.tensors.items():
        module, role = parse_key("peft", key) or ("", Role.ALPHA)
        owner = module
        while owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
        own = [name for name in parameters if f".{owner}".endswith(f".{name.rpartition('.')[0]}")]
        if role is not Role.A or not own or len(info.shape) != 2:
            continue
        found = {settings.of(f"{owner}.{name.rpartition('.')[2]}") for name in own}
        one = next(iter(found))
        if module.count(".base_layer") >= len({name.rpartition(".")[2] for name in own}):
            raise ValueError(f"{key}: target_parameters={parameters} has too few parameters of {owner}; save it again.")
        if len(found) > 1:
            raise NotImplementedError(f"{module}: rank_pattern or alpha_pattern tells its parameters apart; use none.")
        if info.shape[0] % one.rank:
            raise ValueError(f"{key}: {info.shape[0]} rows are no multiple of the rank {one.rank}; save it again.")
        experts[module] = info.shape[0] // one.rank
        ranks[f"^{re.escape(module)}$"] = info.shape[0]
        alphas[f"^{re.escape(module)}$"] = alpha_of(one.scale, info.shape[0], settings.rslora)
    targets = config.get("target_modules")
    plain["target_modules"] = [*targets, *experts] if isinstance(targets, list) else targets or list(experts)
    plain["rank_pattern"] = {**ranks, **(config.get("rank_pattern") or {})}
    plain["alpha_pattern"] = {**alphas, **(config.get("alpha_pattern") or {})}
    return experts, plain
