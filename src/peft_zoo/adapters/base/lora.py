"""Base classes of the methods that extend peft's LoRA: its layers, keys and file format stay the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from peft_zoo.adapters.base.config import TrainedConfig, check_rank
from peft_zoo.adapters.base.exact_merge import with_exact_merge
from peft_zoo.adapters.base.offload import loaded
from peft_zoo.adapters.base.tuner import MethodTuner
from peft_zoo.adapters.base.weighted import (
    Combination,
    bias_of,
    check_adapters,
    combined,
    lora_layers,
    new_config,
    rank_of_type,
    write,
)
from peft_zoo.common.modules import plain_name
from peft_zoo.io import LoraAdapter, TensorFile


class ZooLoraConfig(TrainedConfig, LoraConfig):
    """Base of a configuration with every field of peft's `LoraConfig`; a method adds fields and checks.

    Raises:
        ValueError: If a number is out of bounds, such as an `r` below 1.
    """

    loads_in_diffusers: ClassVar[bool] = True
    exportable: ClassVar[str] = "exact"

    def open_factors(self, file: TensorFile, fields: Mapping[str, Any], has_base: bool) -> LoraAdapter | None:
        """Returns the factors in the file of a saved adapter, which is a plain LoRA but for its type."""
        return LoraAdapter(file, {**fields, "peft_type": "LORA"})

    def as_plain_lora(self) -> LoraConfig:
        """Returns the same adapter as a `LoraConfig` of peft, without the method's own fields."""
        values = {item.name: copy.deepcopy(getattr(self, item.name)) for item in fields(LoraConfig) if item.init}
        return LoraConfig(**{**values, "peft_type": None})


class ZooLoraModel(MethodTuner, LoraModel):
    """Base of a tuner that is found under the type of a `ZooLoraConfig` and uses peft's LoRA layers."""

    def _create_and_replace(  # type: ignore[override]
        self, lora_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: Any, **place: Any
    ) -> None:
        """Creates a layer as peft does; patterns match the module's name without wrappers.

        A base layer that accelerate offloads is loaded meanwhile: peft puts an adapter on the device of its weight.
        """
        name, base = plain_name(place.pop("current_key")), getattr(target, "get_base_layer", lambda: target)()
        rank = lora_config.rank_pattern.get(get_pattern_key(lora_config.rank_pattern.keys(), name), lora_config.r)
        weight = getattr(base, "weight", None)
        shape = (0,) if weight is None else tuple(weight.shape)
        check_rank(lora_config, rank, shape[0], math.prod(shape[1:]))
        with loaded(base):
            super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, name, **place)

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        """Creates peft's layer for a module, with exact merging.

        Raises:
            ValueError: If the module is an `nn.MultiheadAttention`: peft applies the update of its `out_proj` twice,
                and merges and unmerges in each forward pass.
        """
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, nn.MultiheadAttention) and kwargs.get("parameter_name") is None:
            raise ValueError(
                f"Target module {kwargs.get('target_name')}: peft's LoRA of nn.MultiheadAttention applies the update "
                "of out_proj twice. Take it out of `target_modules`."
            )
        return with_exact_merge(LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs))

    def contained_factors(self, path: str, layer: LoraLayer, is_contained_once: bool) -> tuple[Tensor, Tensor] | None:
        """Returns B₀ and A₀ if every adapter of a layer contains `B₀ A₀` beside its own update, else None.

        Args:
            path: Name of the layer.
            layer: LoRA layer.
            is_contained_once: Whether a sum that is being built contains it once anyway. If not, and a method does not
                know the factors, it raises a ValueError.
        """
        return None

    def add_weighted_adapter(  # type: ignore[override]
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        **svd_options: Any,
    ) -> None:
        """Adds an adapter whose update is the combination of the updates of others, with every scale and bias.

        Args:
            adapters: Names of the adapters.
            weights: One factor for each, of any sign.
            adapter_name: Name of the new adapter.
            combination_type: As in peft: `"cat"` is exact; `"svd"` (default) and the types that end in `_svd` are the
                best approximation of rank `svd_rank`, and warn with its error; the others keep the rank.
            svd_rank: Rank for these types; default: the largest of the adapters.
            density: Share of the entries that the types with pruning keep, above 0, up to 1.
            majority_sign_method: `"total"` or `"frequency"`, for `ties` and `dare_ties`.
            svd_options: `svd_full_matrices` and `svd_driver` of peft, which change nothing here.

        Raises:
            ValueError: If the combination is not a LoRA of that rank; the model is unchanged then.
        """
        known = {"svd_full_matrices", "svd_driver", "svd_clamp"}
        if svd_options.keys() - known or svd_options.get("svd_clamp") is not None:
            raise ValueError(f"{svd_options!r}: leave it out; clamped factors are not the best approximation any more.")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} exists already; choose another name, or delete it first.")
        kind = "linear" if len(adapters) == 1 and svd_rank is None else combination_type
        combination = Combination(tuple(adapters), tuple(weights), kind, density, majority_sign_method)
        check_adapters(self, combination)
        configs = [self.peft_config[name] for name in adapters]
        limit = rank_of_type(combination, configs, svd_rank)
        found = combined(self, combination, limit)
        rank = limit or max(len(A) for _, A in found.values())
        layers = dict(lora_layers(self.model))
        biases = {path: bias_of(layers[path], dict(zip(adapters, weights, strict=True))) for path in found}
        has_bias = any(config.lora_bias for config in configs)
        self.peft_config[adapter_name] = new_config(configs[0], rank, {plain_name(path) for path in found}, has_bias)
        self.inject_adapter(self.model, adapter_name)
        for path, factors in found.items():
            write(layers[path], adapter_name, factors, biases[path])
