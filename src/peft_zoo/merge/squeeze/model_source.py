"""Reads factors from a LoRA in a model and replaces them, or adds the compressed LoRA as another adapter."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import PeftWarning
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from peft_zoo.adapters.base.saving import named_exactly
from peft_zoo.adapters.squeeze_lora.factors import LoraPair, lora_pairs, scale_bias, write_factors
from peft_zoo.adapters.squeeze_lora.finalize import config_table, write_ranks
from peft_zoo.io.lora_config import INITIALIZATION_FIELDS, keeps_rslora
from peft_zoo.io.lora_ranks import RankAndScale, rank_fields
from peft_zoo.merge.squeeze.source import SqueezeFactors

ADAPTER_NAME = r"[A-Za-z0-9_-]{1,64}"  # adapter names become part of paths and parameter names
NUM_INPUTS = 64
"""Random inputs on which the outputs of a DoRA layer are compared before and after."""


class ModelSource:
    """Modules of an adapter in a model, and the name of a new adapter for the result; None replaces the factors."""

    def __init__(self, model: nn.Module, adapter_name: str, into: str | None) -> None:
        self.model, self.adapter_name, self.into = model, adapter_name, into
        self.pairs = {pair.name: pair for pair in lora_pairs(model, adapter_name)}
        self.names: Sequence[str] = list(self.pairs)
        if into is None:
            return
        if not isinstance(model, PeftModel):
            raise ValueError(f"into={into!r} needs a PeftModel, not a {type(model).__name__}; leave it out.")
        if into in model.peft_config:
            raise ValueError(f"into={into!r} is taken; available: {sorted(model.peft_config)}, give another name.")
        # torch refuses attributes of ModuleDict as keys, and peft warns about names that its prefix contains
        if (
            not isinstance(into, str)
            or not re.fullmatch(ADAPTER_NAME, into)
            or into in "lora_"
            or hasattr(nn.ModuleDict(), into)
        ):
            raise ValueError(
                f"into={into!r} cannot name an adapter; use other letters, digits, '_' and '-', such as 'r8'."
            )

    def adjusted(self, modules: Mapping[str, RankAndScale], exceed: bool) -> dict[str, RankAndScale]:
        """The planned ranks and scales: a model takes any."""
        return dict(modules)

    def overhead(self, modules: Mapping[str, RankAndScale]) -> int:
        """0: a budget in bytes limits the factors only."""
        return 0

    def factors(self, name: str) -> SqueezeFactors:
        """Factors of one module; it may not be dropped, since its layer needs a rank of at least 1."""
        pair = self.pairs[name]
        return SqueezeFactors(*pair.matrices(), pair.scale, 1)

    def weight_norm(self, name: str) -> float:
        """Frobenius norm of the base weight of one module; 1 if all weights are zero."""
        weight = dequantize_module_weight(self.pairs[name].layer.get_base_layer())
        return weight.detach().float().norm().item() or 1.0

    def write(
        self, modules: Mapping[str, RankAndScale], factors: Iterable[tuple[str, Tensor, Tensor]]
    ) -> dict[str, float]:
        """Puts the new factors into the model once all are computed; returns the output error of modules with DoRA."""
        config_table(self.model, self.adapter_name)  # raises where the rank may not change
        watched = [pair for pair in self.pairs.values() if pair.layer.lora_variant.get(self.adapter_name) is not None]
        before = {pair.name: _outputs(pair, self.adapter_name) for pair in watched}
        new = {name: (B, A) for name, B, A in factors}
        if self.into is None:
            self._replace(modules, new)
        else:
            self._add(self.into, modules, new)
        after = {pair.name: _outputs(pair, self.into or self.adapter_name) for pair in watched}
        return {name: _relative_change(before[name], after[name]) for name in before}

    def _replace(self, modules: Mapping[str, RankAndScale], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Writes new factors over the old ones."""
        rslora = keeps_rslora(modules)
        for name, pair in self.pairs.items():
            if not rslora:
                pair.layer.use_rslora[self.adapter_name] = False
            write_factors(pair, *factors[name], modules[name].scale)
        write_ranks(self.model, self.adapter_name, list(self.pairs.values()))

    def _add(
        self, into: str, modules: Mapping[str, RankAndScale], factors: Mapping[str, tuple[Tensor, Tensor]]
    ) -> None:
        """Adds an adapter with the new factors and all other tensors and fields of the old one."""
        model: PeftModel = self.model  # type: ignore[assignment]
        old = named_exactly(model.peft_config[self.adapter_name], model.get_base_model(), self.adapter_name)
        kept = (item.name for item in fields(LoraConfig) if item.init and item.name not in INITIALIZATION_FIELDS)
        values = {name: copy.deepcopy(getattr(old, name)) for name in kept}
        rslora = bool(old.use_rslora) and keeps_rslora(modules)
        changes = {"use_rslora": rslora, "peft_type": None, **rank_fields(modules, rslora)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*invalid shape", PeftWarning)  # peft mistakes a bias of B for a shard
            state = get_peft_model_state_dict(model, adapter_name=self.adapter_name, save_embedding_layers=False)
        widen = any(pair.A.dtype == torch.float32 for pair in self.pairs.values())
        model.add_adapter(into, LoraConfig(**{**values, **changes}), autocast_adapter_dtype=widen)
        pairs = {pair.name: pair for pair in lora_pairs(model, into)}
        factor_keys = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
        others = {key: value for key, value in state.items() if not key.endswith(factor_keys)}
        set_peft_model_state_dict(model, others, adapter_name=into)
        for name, pair in pairs.items():
            write_factors(pair, *factors[name], modules[name].scale)
            scale_bias(pair, self.pairs[name].scale / modules[name].scale)


class _Outputs(NamedTuple):
    """Outputs of an adapted layer and of its base layer for the same random inputs."""

    adapted: Tensor
    base: Tensor


@torch.no_grad()
def _outputs(pair: LoraPair, adapter: str) -> _Outputs:
    """Outputs of a layer for fixed random inputs, with one adapter active, in evaluation mode."""
    layer: Any = pair.layer
    base = layer.get_base_layer()
    inputs = _inputs(base, pair)
    with _only_adapter(layer, adapter):
        return _Outputs(layer(inputs).double(), base(inputs).double())


def _inputs(base: Any, pair: LoraPair) -> Tensor:
    """Random inputs for a layer: rows, patches of the size of the kernel, or tokens."""
    device, generator = pair.A.device, torch.Generator().manual_seed(0)
    if isinstance(base, nn.Embedding):
        return torch.randint(base.num_embeddings, (NUM_INPUTS,), generator=generator).to(device)
    kernel = getattr(base, "kernel_size", None)
    if kernel is None:
        shape: tuple[int, ...] = (NUM_INPUTS, pair.A.shape[1])
    else:
        spans = [d * (k - 1) + 1 for k, d in zip(kernel, base.dilation, strict=True)]
        shape = (NUM_INPUTS, pair.A.shape[1], *spans)
    dtype = base.weight.dtype if base.weight.is_floating_point() else pair.A.dtype
    return torch.randn(shape, generator=generator).to(device, dtype)


@contextmanager
def _only_adapter(layer: Any, adapter: str) -> Iterator[None]:
    """Activates one adapter of a layer, in evaluation mode, and restores the state at the end."""
    before = layer._active_adapter, layer._disable_adapters, layer.training
    layer._active_adapter, layer._disable_adapters = [adapter], False
    layer.eval()
    try:
        yield
    finally:
        layer._active_adapter, layer._disable_adapters = before[:2]
        layer.train(before[2])


def _relative_change(before: _Outputs, after: _Outputs) -> float:
    """Norm of the change of the outputs, divided by the norm of the adapter's contribution to them before."""
    effect = (before.adapted - before.base).norm().item()
    return (after.adapted - before.adapted).norm().item() / effect if effect else 0.0
