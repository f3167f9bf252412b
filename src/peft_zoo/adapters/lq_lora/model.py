r"""LQ-LoRA: a base model quantized to a budget of bits, and a LoRA that begins as what quantizing loses.

    W ~ Q + s B A                        Q in NormalFloat, B and A trained, from the decomposition
    min |W - Q - s B A|                  by turns: an SVD of W - Q, and Q = quantize(W - s B A)    (Alg. 1)
    sum bits_i <= budget                 each matrix its own way to quantize, by a knapsack        (eq. 7)

Cost: the weights take `budget_bits` a number instead of 16; training keeps what a LoRA keeps, and restores each weight
twice a step, which a LoRA on 16-bit weights need not. Use it where memory is short.

What is left without the adapter is Q, which is not the base model: its largest directions are in B and A. With
`keep_init=True` or "nf8" they are kept and stand in for a disabled adapter.

A model of the standalone form (`standalone`) is quantized already: nothing is computed there, and the adapter takes
over the part of low rank that stands beside Q.

Source: LQ-LoRA (Guo, Greengard, Xing, Kim, arXiv 2311.12023).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from peft_zoo import registration
from peft_zoo.adapters.base import ZooLoraModel, expand_all_linear
from peft_zoo.adapters.lq_lora.config import LqLoraConfig, nf_config
from peft_zoo.adapters.lq_lora.layer import LqLinear
from peft_zoo.adapters.lq_lora.nf_linear import Factors, NFLinear, beside, empty_nf_linear
from peft_zoo.adapters.lq_lora.plan import plan, rank_of, split
from peft_zoo.adapters.lq_lora.residual_warnings import (
    warn_of_missed,
    warn_of_sums,
    warn_of_weights,
    warn_of_what_is_left,
)
from peft_zoo.adapters.lq_lora.state import DIGEST, PREFIX, base_hash, check_names, check_saved, digest_of, rebuild
from peft_zoo.adapters.lq_lora.targets import outside_adapters, refuse_packed
from peft_zoo.kernels.normal_float.quantize import NFConfig


@registration.register(
    LqLoraConfig,
    summary="LQ-LoRA: the base quantized to a budget of bits, its loss taken up by the LoRA that is trained.",
    parameters="r·(in + out)",
    memory="as LoRA: T·r; the base layer in 2 to 8 bits a number",
    flops="as LoRA: 4·T·in·out + 6·T·r·(in + out), and the weight restored twice",
    paper="LQ-LoRA, arXiv 2311.12023",
)
class LqLoraModel(ZooLoraModel):
    """peft's LoRA on linear layers that it quantizes first."""

    _rebuilt: dict[str, NFLinear]  # from `_prepare_model` until they take their places

    # ---- making layers ----

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if config.lq_state == "new":
            return
        others = [other for other in self.peft_config.values() if other is not config]
        digests = dict.fromkeys(name for name, way in (config.qconfig_map or {}).items() if way)
        digests |= config.base_sha256 or {}
        found = [(name, layer.quantized) for name, layer in _layers(self.model)]
        if not others:
            found = [(name, layer) for name, layer in (*found, *_alone(self.model)) if name in digests]
        present = {name: base_hash(layer) for name, layer in found}
        for name in digests if others else present:
            if present.get(name) != digests[name]:
                raise ValueError(
                    f"base_sha256: this adapter belongs to another quantized matrix of {name} than that of the model; "
                    "load it onto a base model of its own."
                )
        if others:
            warn_of_missed(dict(_layers(self.model)), present.keys() - digests.keys())

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Decide how each matrix is quantized, or do that again, before anything is changed."""
        super()._prepare_model(peft_config, model)
        modules = dict(model.named_modules())
        for name in (name for name, way in (peft_config.qconfig_map or {}).items() if way and name in modules):
            refuse_packed(name, modules[name])
        layers = dict(_layers(model))
        if peft_config.lq_state == "decomposed":
            self._prepare_loaded(peft_config, model, layers)
            return
        if not peft_config.init_lora_weights:
            return
        if len(self.peft_config) == 1:
            ways = self._ways_alone(peft_config, model)
            plan(peft_config, model, self._check_target_module_exists)
            if ways:
                peft_config.qconfig_map = {**ways, **(peft_config.qconfig_map or {})}
            return
        # Other adapters count on the matrices as they are: a further one quantizes nothing.
        expanded = expand_all_linear(peft_config, model)
        own = {name: layer for name, layer in layers.items() if self._check_target_module_exists(expanded, name)}
        warn_of_missed(layers, layers.keys() - own.keys())
        peft_config.qconfig_map = {name: list(layer.quantized.config) for name, layer in own.items()}
        peft_config.keep_init = _keeps(own.values())

    def _prepare_loaded(self, config: LqLoraConfig, model: nn.Module, layers: dict[str, LqLinear]) -> None:
        """What no file has is made again; of what others keep, the configuration says how."""
        if config.save_base == "none":
            there = [*layers, *dict(_alone(model))]
            self._rebuilt = rebuild(config, model, self._check_target_module_exists, there)
        shared = [layers[name] for name in config.base_sha256 or () if name in layers]
        if shared:
            config.keep_init = _keeps(shared)

    def _ways_alone(self, config: LqLoraConfig, model: nn.Module) -> dict[str, list[Any]]:
        """How the targeted matrices are quantized that are so already, in a model of the standalone form."""
        expanded = expand_all_linear(config, model)
        ways, given = {}, config.qconfig_map or {}
        for name, layer in _alone(model):
            if not self._check_target_module_exists(expanded, name):
                continue
            if given.get(name) is not None and nf_config(given[name]) != layer.config:
                raise ValueError(
                    f"qconfig_map: {name} is quantized already, as {list(layer.config)} and not as {given[name]!r}; "
                    "leave it out, or load the model in floating-point."
                )
            ways[name] = list(layer.config)
        return ways

    def _create_and_replace(  # type: ignore[override]
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        way = (lora_config.qconfig_map or {}).get(current_key)
        fresh, factors = lora_config.lq_state == "new" and lora_config.init_lora_weights, None
        if isinstance(target, LqLinear):
            factors = self._factors_of_another(target) if fresh else None
        elif way is not None and not isinstance(target, LoraLayer) and kwargs.get("parameter_name") is None:
            target, factors = self._quantized(lora_config, nf_config(way), target, current_key, fresh)
            setattr(parent, target_name, target)
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        if factors is not None:
            getattr(parent, target_name).start(adapter_name, factors)

    def _quantized(
        self, config: LqLoraConfig, way: NFConfig, layer: nn.Module, name: str, fresh: bool
    ) -> tuple[nn.Module, Factors | None]:
        """What an adapter goes around in the place of a layer, and where it starts unless its values are in a file."""
        loaded = config.lq_state == "decomposed"
        if isinstance(layer, NFLinear) and (fresh or loaded):
            base, factors = beside(layer, config.keep_init)
            return base, factors if fresh else None
        if fresh:
            return split(config, way, layer, rank_of(config, name, layer), name)
        if loaded and config.save_base != "none":
            base = empty_nf_linear(layer, way, config.keep_init, rank_of(config, name, layer))
            base.awaited = (config.base_sha256 or {}).get(name, "")
            return base, None
        return self._rebuilt.pop(name, layer), None

    def _factors_of_another(self, layer: LqLinear) -> Factors | None:
        """Where a further adapter starts: as the first one did, or where that is not kept, from where it is now."""
        initial = layer.quantized.initial
        if initial is not None or not layer.lora_A:
            return initial
        first = next(iter(layer.lora_A))
        warnings.warn(
            f"Without keep_init=True nothing is kept of what was split off the base; adapter {first!r}, as it is now, "
            "is where the new one starts.",
            stacklevel=2,
        )
        return layer.factors(first)

    @staticmethod
    def _create_new_module(lora_config: LqLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(target, NFLinear) and not target.standing:
            return LqLinear(target, adapter_name, config=lora_config, **kwargs)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As peft; afterwards the configuration knows the base it belongs to."""
        self._rebuilt = {}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._rebuilt = {}
        config: Any = self.peft_config[adapter_name]
        if config.lq_state == "new" and config.init_lora_weights:
            own = ((name, layer) for name, layer in _layers(model) if adapter_name in layer.lora_A)
            config.base_sha256 = {name: base_hash(layer.quantized) for name, layer in own}

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As peft; without autocast, adapters take the dtype that the weight had, which packed codes do not show."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for _, layer in _layers(self.model):
            if adapter_name in layer.lora_A:
                layer.lora_A[adapter_name].to(layer.quantized.dtype)
                layer.lora_B[adapter_name].to(layer.quantized.dtype)

    # ---- without the adapter ----

    def disable_adapter_layers(self) -> None:
        """As peft; warns where what is left is not the base model."""
        warn_of_what_is_left(dict(_layers(self.model)))
        super().disable_adapter_layers()

    def unload(self) -> nn.Module:
        """As peft; warns where what is left is not the base model."""
        warn_of_what_is_left(dict(_layers(self.model)))
        return super().unload()

    # ---- several adapters ----

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As peft; warns where several adapters would have what was split off several times."""
        super().set_adapter(adapter_name, inference_mode)
        warn_of_sums(dict(_layers(self.model)))

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], *args: Any, **kwargs: Any) -> None:
        """As peft; warns of weights with which the sum has what was split off more or less than once."""
        with warnings.catch_warnings():  # where it starts does not matter: it is overwritten at once
            warnings.filterwarnings("ignore", message="Without keep_init=True nothing is kept")
            super().add_weighted_adapter(adapters, weights, *args, **kwargs)
        warn_of_weights(dict(_layers(self.model)), weights)

    # ---- files ----

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """As a LoRA, and the quantized matrices, merged or not, or with `save_base="none"` their hashes."""
        config.check_save_base()
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        prefix = PREFIX if isinstance(model, PeftModel) else ""
        for name, layer in _layers(model):
            if adapter_name in layer.lora_A:
                base = layer.quantized
                base.receive()
                parts = base.saved() if config.save_base == "quantized" else [(DIGEST, digest_of(base))]
                found.update((f"{prefix}{name}.base_layer.{part}", tensor) for part, tensor in parts)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As a LoRA; the quantized matrices must be those that the configuration names.

        Raises:
            ValueError: If they are not, or one is missing.
        """
        state_dict = dict(state_dict)
        layers = {name: layer for name, layer in _layers(model) if adapter_name in layer.lora_A}
        check_names(config, layers)
        for name, layer in layers.items():
            check_saved(name, layer.quantized, config, state_dict, shared=len(layer.lora_A) > 1)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _layers(model: nn.Module) -> Iterator[tuple[str, LqLinear]]:
    """Every quantized layer, by the name it has in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, LqLinear):
            bare = ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module")
            yield bare.removeprefix(PREFIX), module


def _alone(model: nn.Module) -> Iterator[tuple[str, NFLinear]]:
    """Every quantized layer that no adapter is around."""
    return ((name, module) for name, module in outside_adapters(model) if isinstance(module, NFLinear))


def _keeps(layers: Iterable[LqLinear]) -> bool | str:
    """How what was split off is kept there, which one adapter has decided for all."""
    return next((how for layer in layers if (how := layer.quantized.keeps)), False)


__all__ = ["LqLoraModel"]
