"""A LoRA in a model as a source of factors, and the compressed one put in its place or beside it."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import PeftWarning
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from peft_zoo.adapters.squeeze_lora.factors import LoraPair, lora_pairs, scale_bias, write_factors
from peft_zoo.adapters.squeeze_lora.finalize import config_table, write_ranks
from peft_zoo.io.lora_config import HOW_IT_BEGAN, keeps_rslora
from peft_zoo.io.lora_ranks import RankAndScale, rank_fields
from peft_zoo.merge.squeeze.source import Factors, Make

NAME = r"[A-Za-z0-9_-]{1,64}"  # of an adapter: it becomes part of paths and of parameters' names
PROBES = 64
"""Random inputs on which the effect of a DoRA is compared before and after."""


class ModelSource:
    """The modules of an adapter in a model.

    Args:
        model: A `PeftModel`, or any model with LoRA layers if `into` is None.
        adapter_name: The adapter.
        into: Name of a new adapter for the result; None replaces the factors.

    Raises:
        ValueError: If the adapter is not there or is merged, or `into` is taken or cannot be added.
        NotImplementedError: If a module's update is not a plain product of two factors.
    """

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
        # torch keeps what its containers have as attributes for itself, and peft warns of parts of its prefix
        if (
            not isinstance(into, str)
            or not re.fullmatch(NAME, into)
            or into in "lora_"
            or hasattr(nn.ModuleDict(), into)
        ):
            raise ValueError(
                f"into={into!r} cannot name an adapter; use other letters, digits, '_' and '-', such as 'r8'."
            )

    def overhead(self, modules: Mapping[str, RankAndScale]) -> int:
        """A size is that of the factors."""
        return 0

    def factors(self, name: str) -> Factors:
        """One module; it keeps its layer, hence a rank."""
        pair = self.pairs[name]
        return Factors(*pair.matrices(), pair.scale, 1)

    def weight_norm(self, name: str) -> float:
        """Frobenius norm of the module's base weight; 1 of a weight of zeros."""
        weight = dequantize_module_weight(self.pairs[name].layer.get_base_layer())
        return weight.detach().float().norm().item() or 1.0

    def write(self, modules: Mapping[str, RankAndScale], make: Make) -> dict[str, float]:
        """Puts the new factors into the model; what DoRA makes of them is compared on random inputs."""
        config_table(self.model, self.adapter_name)  # raises where the rank may not change
        watched = [pair for pair in self.pairs.values() if pair.layer.lora_variant.get(self.adapter_name) is not None]
        before = {pair.name: _outputs(pair, self.adapter_name) for pair in watched}
        factors = {name: make(name) for name in modules}
        if self.into is None:
            self._replace(modules, factors)
        else:
            self._add(self.into, modules, factors)
        after = {pair.name: _outputs(pair, self.into or self.adapter_name) for pair in watched}
        return {name: _relative(before[name], after[name]) for name in before}

    def _replace(self, modules: Mapping[str, RankAndScale], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        table = config_table(self.model, self.adapter_name)
        rslora = keeps_rslora(modules)
        for name, pair in self.pairs.items():
            if not rslora:
                pair.layer.use_rslora[self.adapter_name] = False
            write_factors(pair, *factors[name], modules[name].scale)
        write_ranks(table[self.adapter_name], list(self.pairs.values()))

    def _add(
        self, into: str, modules: Mapping[str, RankAndScale], factors: Mapping[str, tuple[Tensor, Tensor]]
    ) -> None:
        """Adds an adapter with the new ranks and everything else of the old one."""
        model: PeftModel = self.model  # type: ignore[assignment]
        old: Any = model.peft_config[self.adapter_name]
        kept = (item.name for item in fields(LoraConfig) if item.init and item.name not in HOW_IT_BEGAN)
        values = {name: copy.deepcopy(getattr(old, name)) for name in kept}
        rslora = bool(old.use_rslora) and keeps_rslora(modules)
        changes = {"use_rslora": rslora, "peft_type": None, **rank_fields(modules, rslora)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*invalid shape", PeftWarning)  # takes a bias of B for a shard
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
    """What a layer gives for random inputs, and what its base gives."""

    adapted: Tensor
    base: Tensor


@torch.no_grad()
def _outputs(pair: LoraPair, adapter: str) -> _Outputs:
    """The layer's outputs with one adapter alone, in evaluation mode, the same inputs each time."""
    layer: Any = pair.layer
    base = layer.get_base_layer()
    inputs = _inputs(base, pair)
    with _alone(layer, adapter):
        return _Outputs(layer(inputs).double(), base(inputs).double())


def _inputs(base: Any, pair: LoraPair) -> Tensor:
    """Random inputs for a layer: rows, images a little larger than the kernel, or tokens."""
    device, generator = pair.A.device, torch.Generator().manual_seed(0)
    if isinstance(base, nn.Embedding):
        return torch.randint(base.num_embeddings, (PROBES,), generator=generator).to(device)
    kernel = getattr(base, "kernel_size", None)
    if kernel is None:
        shape: tuple[int, ...] = (PROBES, pair.A.shape[1])
    else:
        spans = [d * (k - 1) + 1 for k, d in zip(kernel, base.dilation, strict=True)]
        shape = (PROBES, pair.A.shape[1], *spans)
    dtype = base.weight.dtype if base.weight.is_floating_point() else pair.A.dtype
    return torch.randn(shape, generator=generator).to(device, dtype)


@contextmanager
def _alone(layer: Any, adapter: str) -> Iterator[None]:
    """Lets one adapter of a layer act alone, without dropout."""
    before = layer._active_adapter, layer._disable_adapters, layer.training
    layer._active_adapter, layer._disable_adapters = [adapter], False
    layer.eval()
    try:
        yield
    finally:
        layer._active_adapter, layer._disable_adapters = before[:2]
        layer.train(before[2])


def _relative(before: _Outputs, after: _Outputs) -> float:
    """How far the outputs moved, relative to what the adapter does."""
    effect = (before.adapted - before.base).norm().item()
    return (after.adapted - before.adapted).norm().item() / effect if effect else 0.0
