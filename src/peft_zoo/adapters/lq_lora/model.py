r"""LQ-LoRA: quantizes the base weights to a bit budget and initializes the LoRA factors from the quantization error.

    W ~ Q + s B A                        Q in NormalFloat, B and A trained
    min |W - Q - s B A|                  in turn: an SVD of W - Q, and Q = quantize(W - s B A)     (Alg. 1)
    sum bits_i <= budget                 a quantization config for each layer, by a knapsack       (eq. 7)

Cost: weights take `budget_bits` bits instead of 16; training saves what a LoRA saves, and dequantizes each weight twice
per step, which a LoRA on 16-bit weights does not need. Use it where memory is short.

Q alone is not the base model: its largest singular directions are in B and A. So the base layers keep the initial
factors and add them when the adapter is disabled, by default in 8 bits (`keep_init="nf8"`).

A standalone model (`standalone`) is quantized already: adapters start from its low-rank part.

Source: LQ-LoRA (Guo, Greengard, Xing, Kim, arXiv 2311.12023).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_zoo import registration
from peft_zoo.adapters.base import ZooLoraModel, expand_all_linear
from peft_zoo.adapters.base.loading import TRIAL
from peft_zoo.adapters.base.mixed_batch import BASE
from peft_zoo.adapters.base.offload import has_disk_layers, loaded
from peft_zoo.adapters.lq_lora.config import LqLoraConfig, nf_config
from peft_zoo.adapters.lq_lora.decompose import quantize_layer, rank_of
from peft_zoo.adapters.lq_lora.importance import prepared_importance
from peft_zoo.adapters.lq_lora.layer import WITHOUT_ADAPTER, LqLinear
from peft_zoo.adapters.lq_lora.nf_linear import Factors, NFLinear, detach_initial_factors, empty_nf_linear
from peft_zoo.adapters.lq_lora.plan import QuantizationPlan, plan
from peft_zoo.adapters.lq_lora.state import (
    PREFIX,
    base_hash,
    check_file,
    check_listed,
    check_names,
    check_saved,
    conditions,
    expect_file,
    initial_hashes,
    is_base_tensor,
    is_initial_factor,
    loaded_keys,
    rebuild,
    saved_base,
)
from peft_zoo.adapters.lq_lora.targets import outside_adapters, refuse_quantized
from peft_zoo.common.modules import plain_modules, plain_name
from peft_zoo.kernels.normal_float.quantize import NFConfig


@registration.register(
    LqLoraConfig,
    summary="LQ-LoRA: base weights quantized to a bit budget; the LoRA starts from the quantization error.",
    parameters="r·(in + out)",
    memory="as LoRA: T·r; the base layer in 2 to 8 bits per weight",
    flops="as LoRA: 4·T·in·out + 6·T·r·(in + out), plus dequantizing the weight twice",
    paper="LQ-LoRA, arXiv 2311.12023",
)
class LqLoraModel(ZooLoraModel):
    """Tuner of LQ-LoRA: peft's LoRA on linear layers that it quantizes first."""

    _rebuilt: dict[str, NFLinear]  # layers that `_prepare_model` decomposed, until they replace those of the model

    # ---- creating layers ----

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if config.lq_state == "new":
            return
        others = [other for other in self._own_configs() if other is not config]
        digests = dict.fromkeys(name for name, nf in (config.qconfig_map or {}).items() if nf)
        digests |= config.base_sha256 or {}
        found = [(name, layer.quantized) for name, layer in _layers(self.model)]
        if not others:
            found = [(name, layer) for name, layer in (*found, *_without_adapter(self.model)) if name in digests]
        present = {name: base_hash(layer) for name, layer in found}
        for name in digests if others else present:
            if present.get(name) != digests[name]:
                raise ValueError(
                    f"base_sha256: this adapter belongs to another quantized weight of {name} than the model's; load "
                    "it onto its own base model."
                )
        check_listed(config, found)
        if others:
            _warn_untargeted(dict(_layers(self.model)), present.keys() - digests.keys())

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Plans the quantization, or repeats a saved one, before any layer is changed."""
        super()._prepare_model(peft_config, model)
        modules, given = dict(model.named_modules()), peft_config.qconfig_map or {}
        for name in (name for name, nf in given.items() if nf and name in modules):
            refuse_quantized(name, modules[name])
        layers = dict(_layers(model))
        wrapped = next((name for name in modules if plain_name(name) != name), None)
        if wrapped is not None and not layers:
            raise ValueError(f"{wrapped} is wrapped, for example by torch.compile; add the adapter before wrapping.")
        if peft_config.lq_state == "decomposed":
            self._prepare_loaded(peft_config, model, layers)
        elif peft_config.init_lora_weights and len(self._own_configs()) == 1:
            quantized = self._standalone_configs(peft_config, model)
            new = plan(peft_config, model, self._check_target_module_exists, prepared_importance(model))
            QuantizationPlan({**quantized, **new.configs}, new.ranks).fill_in(peft_config)
        elif peft_config.init_lora_weights:
            # Other adapters need the quantized weights as they are: a further adapter quantizes nothing.
            expanded = expand_all_linear(copy.copy(peft_config), model)
            own = {name: layer for name, layer in layers.items() if self._check_target_module_exists(expanded, name)}
            _warn_untargeted(layers, layers.keys() - own.keys())
            peft_config.qconfig_map = {name: list(layer.quantized.config) for name, layer in own.items()}
            peft_config.keep_init = _keep_init(own.values())

    def _own_configs(self) -> list[LqLoraConfig]:
        """Returns the configurations of this method; transformers' `add_adapter` leaves others in the same model."""
        return [config for config in self.peft_config.values() if isinstance(config, LqLoraConfig)]

    def _prepare_loaded(self, config: LqLoraConfig, model: nn.Module, layers: dict[str, LqLinear]) -> None:
        """Decomposes layers that no file contains; layers of other adapters determine `keep_init`."""
        if config.save_base == "none" and TRIAL not in vars(config):
            quantized = [*layers, *dict(_without_adapter(model))]
            self._rebuilt = rebuild(config, model, self._check_target_module_exists, quantized)
        shared = [layers[name] for name in config.base_sha256 or () if name in layers]
        if shared:
            config.keep_init = _keep_init(shared)

    def _standalone_configs(self, config: LqLoraConfig, model: nn.Module) -> dict[str, NFConfig]:
        """Returns the quantization configs of target layers that are quantized already, in a standalone model."""
        expanded = expand_all_linear(copy.copy(config), model)
        configs, given = {}, config.qconfig_map or {}
        for name, layer in _without_adapter(model):
            if not self._check_target_module_exists(expanded, name):
                continue
            if given.get(name) is not None and nf_config(given[name]) != layer.config:
                raise ValueError(
                    f"qconfig_map: {name} is quantized already, as {list(layer.config)} and not as {given[name]!r}; "
                    "leave it out, or load the model in floating-point."
                )
            configs[name] = layer.config
        return configs

    def _create_and_replace(  # type: ignore[override]
        self, lora_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: Any, **place: Any
    ) -> None:
        current_key = place["current_key"]
        listed = (lora_config.qconfig_map or {}).get(current_key)
        is_new, factors = lora_config.lq_state == "new" and lora_config.init_lora_weights, None
        if isinstance(target, LqLinear):
            factors = self._initial_factors(target) if is_new else None
        elif listed is not None and not isinstance(target, LoraLayer) and place.get("parameter_name") is None:
            target, factors = self._quantized(lora_config, nf_config(listed), target, current_key, is_new)
            setattr(parent, target_name, target)
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, **place)
        if factors is not None:
            getattr(parent, target_name).set_factors(adapter_name, factors)

    def _quantized(
        self, config: LqLoraConfig, nf: NFConfig, layer: nn.Module, name: str, is_new: bool
    ) -> tuple[nn.Module, Factors | None]:
        """Returns the base layer of an adapter, and the factors it starts from unless its values come from a file."""
        is_loaded = config.lq_state == "decomposed"
        if isinstance(layer, NFLinear) and (is_new or is_loaded):
            base, factors = detach_initial_factors(layer, config.keep_init)
            return base, factors if is_new else None
        if is_new:
            importance = prepared_importance(self.model).get(name)
            return quantize_layer(config, nf, layer, rank_of(config, name, layer), name, importance)
        if is_loaded and not isinstance(layer, (nn.Linear, Conv1D)):
            raise ValueError(
                f"base_sha256 names {name!r}, no linear layer here; load the adapter onto its own base model."
            )
        if is_loaded and (config.save_base != "none" or TRIAL in vars(config)):
            # Where accelerate keeps the layer's weight on a disk, Q comes from the adapter's file all the same.
            on_cpu = has_disk_layers(self.model) or (TRIAL in vars(config) and layer.weight.is_meta)
            device = torch.device("cpu") if on_cpu else None
            return empty_nf_linear(layer, nf, config.keep_init, rank_of(config, name, layer), device=device), None
        return self._rebuilt.pop(name, layer), None

    def _initial_factors(self, layer: LqLinear) -> Factors | None:
        """Returns the factors that a further adapter starts from: initial ones if kept, else the first adapter's."""
        initial = layer.quantized.initial
        if initial is not None or not layer.lora_A:
            return initial
        first = next(iter(layer.lora_A))
        warnings.warn(
            f"With keep_init=False the initial factors are not kept; the new adapter starts from the current values "
            f"of adapter {first!r}.",
            stacklevel=2,
        )
        return layer.factors(first)

    @staticmethod
    def _create_new_module(lora_config: LqLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(target, NFLinear) and not target.use_initial:
            return LqLinear(target, adapter_name, config=lora_config, **kwargs)
        return ZooLoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Injects as peft does; the plan and checksums go into the model's own copy of the configuration."""
        self._rebuilt = {}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._rebuilt = {}

    def _finish_injection(self, model: nn.Module, adapter_name: str) -> None:
        super()._finish_injection(model, adapter_name)
        config: Any = self.peft_config[adapter_name]
        own = {name: layer.quantized for name, layer in _layers(model) if adapter_name in layer.lora_A}
        if config.lq_state == "new" and config.init_lora_weights:
            config.base_sha256 = {name: base_hash(layer) for name, layer in own.items()}
            config.initial_sha256 = initial_hashes(own)
            config.made_with = conditions(next(iter(own.values()))) if own else None
        elif config.lq_state == "decomposed":
            shared = {name for name, layer in _layers(model) if name in own and len(layer.lora_A) > 1}
            expect_file(config, own, shared)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Casts as peft does; without autocast, adapters get the dtype that the weight had before quantization."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for _, layer in _layers(self.model):
            if adapter_name in layer.lora_A:
                layer.lora_A[adapter_name].to(layer.quantized.dtype)
                layer.lora_B[adapter_name].to(layer.quantized.dtype)

    # ---- without the adapter ----

    def disable_adapter_layers(self, quantized_only: bool = False) -> None:
        """Disables as peft does: the layers are then Q plus the initial factors, an approximation of the base model.

        With `keep_init=False` that is not possible and raises a RuntimeError. `quantized_only`: compute with Q alone.
        """
        self._allow_quantized_only(quantized_only)
        super().disable_adapter_layers()

    def enable_adapter_layers(self) -> None:
        """Enables as peft does."""
        for _, layer in _layers(self.model):
            layer.quantized_only = False
        super().enable_adapter_layers()

    def unload(self, quantized_only: bool = False) -> nn.Module:
        """Unloads as peft does: the layers become floating-point ones with the weight Q plus the initial factors.

        With `keep_init=False` that is not possible and raises a RuntimeError. `quantized_only`: they become Q alone.
        """
        self._allow_quantized_only(quantized_only)
        return super().unload()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        quantized_only: bool = False,
    ) -> nn.Module:
        """Merges and unloads as peft does; layers that none of the adapters targets become as with `unload`."""
        names = set(adapter_names or self.active_adapters)
        self._allow_quantized_only(quantized_only, lambda layer: not layer.merged and names.isdisjoint(layer.lora_A))
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Passes `adapter_names` as peft does, unless a sample would get a layer without the initial factors."""
        names = {BASE, *self.peft_config} & set(kwargs.get("adapter_names") or ())
        self._require_factors(lambda layer: not (layer.quantized_only or names <= {*layer.lora_A}))
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def _allow_quantized_only(self, allowed: bool, concerns: Callable[[LqLinear], bool] = lambda _: True) -> None:
        """Sets `quantized_only` of all layers to `allowed`; if that is False, each that it `concerns` needs factors."""
        self._require_factors(lambda layer: not allowed and concerns(layer))
        for _, layer in _layers(self.model):
            layer.quantized_only = allowed

    def _require_factors(self, concerns: Callable[[LqLinear], bool]) -> None:
        """Raises a RuntimeError if a layer that `concerns` is true for does not keep the initial factors."""
        for name, layer in _layers(self.model):
            if not layer.quantized.keep_init and concerns(layer):
                raise RuntimeError(f"{name}: {WITHOUT_ADAPTER}")

    # ---- several adapters ----

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activates as peft does; warns if several adapters would add the low-rank part of the base several times."""
        super().set_adapter(adapter_name, inference_mode)
        _warn_several_active(self.model)

    def contained_factors(self, path: str, layer: LoraLayer, is_contained_once: bool) -> Factors | None:
        """Returns the initial factors: each adapter contains `B₀ A₀`, the low-rank part of the base weight."""
        if not isinstance(layer, LqLinear):
            return None
        initial = layer.quantized.initial
        if initial is None and not is_contained_once:
            raise ValueError(
                f"{path}: each adapter contains the low-rank part B₀A₀ of the base weight, and a combination contains "
                "it Σ w times instead of once; give weights of a sum that add up to 1, or create the first adapter "
                "with keep_init='nf8'."
            )
        return None if is_contained_once else initial

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Combines adapters as for any LoRA; the new adapter contains the low-rank part of the base weight once."""
        with warnings.catch_warnings():  # the values it starts from are overwritten at once
            warnings.filterwarnings("ignore", message="With keep_init=False the initial factors")
            super().add_weighted_adapter(*args, **kwargs)

    # ---- files ----

    is_optional, is_base_tensor = staticmethod(is_initial_factor), staticmethod(is_base_tensor)
    check_values = staticmethod(check_file)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Selects a LoRA's tensors and the quantized weights, also while merged, or hashes with `save_base="none"`."""
        config.check_save_base()
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        prefix = PREFIX if isinstance(model, PeftModel) else ""
        for name, layer in _layers(model):
            if adapter_name in layer.lora_A:
                base = layer.quantized
                with loaded(base):
                    found.update((f"{prefix}{name}.base_layer.{part}", t) for part, t in saved_base(base, config))
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Maps the keys as a LoRA does, after checking the quantized weights against the configuration."""
        state_dict = loaded_keys(model, state_dict)
        layers = {name: layer for name, layer in _layers(model) if adapter_name in layer.lora_A}
        check_names(config, layers)
        for name, layer in layers.items():
            check_saved(model, name, layer.quantized, config, state_dict, shared=len(layer.lora_A) > 1)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _layers(model: nn.Module) -> Iterator[tuple[str, LqLinear]]:
    """Yields every quantized layer with adapters, by name in the base model."""
    for name, module in plain_modules(model):
        if isinstance(module, LqLinear):
            yield name.removeprefix(PREFIX), module


def _without_adapter(model: nn.Module) -> Iterator[tuple[str, NFLinear]]:
    """Yields every quantized layer without an adapter, by name in the base model."""
    return ((name, module) for name, module in outside_adapters(model) if isinstance(module, NFLinear))


def _keep_init(layers: Iterable[LqLinear]) -> bool | str:
    """Returns the `keep_init` that the first adapter has set for the layers."""
    return next((form for layer in layers if (form := layer.quantized.keep_init)), False)


# ---- warnings: without `keep_init`, the low-rank part of the base weight is in the adapters only ----


def _warn_untargeted(layers: Mapping[str, LqLinear], untargeted: Iterable[str]) -> None:
    """Warns that a further adapter does not target some quantized layers."""
    names = sorted(name for name in untargeted if not layers[name].quantized.keep_init)
    if names:
        warnings.warn(
            f"{names[0]} (and {len(names) - 1} more) is quantized but not targeted by the new adapter; its low-rank "
            "part is missing while only that adapter is active, so the layer raises an error then. Target it too, or "
            "create the first adapter with keep_init='nf8'.",
            stacklevel=3,
        )


def _warn_several_active(model: nn.Module) -> None:
    """Warns that several adapters are active, each of which contains the low-rank part."""
    for name, layer in _layers(model):
        if not layer.quantized.keep_init and sum(active in layer.lora_A for active in layer.active_adapters) > 1:
            warnings.warn(
                f"{name}: each active adapter contains the low-rank part of the base weight, so their sum contains it "
                "several times. Create the first adapter with keep_init='nf8'.",
                stacklevel=3,
            )
            return
