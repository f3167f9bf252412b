r"""LQ-LoRA: a base model quantized to a budget of bits, and a LoRA that begins as what quantizing loses.

    W ~ Q + s B A                        Q in NormalFloat, B and A trained, from the decomposition
    min |W - Q - s B A|                  by turns: an SVD of W - Q, and Q = quantize(W - s B A)    (Alg. 1)
    sum bits_i <= budget                 each matrix its own way to quantize, by a knapsack        (eq. 7)

Cost: the weights take `budget_bits` a number instead of 16; training keeps what a LoRA keeps, and restores each weight
twice a step, which a LoRA on 16-bit weights need not. Use it where memory is short.

What is left without the adapter is Q, which is not the base model: its largest directions are in B and A. With
`keep_init=True` they are kept and stand in for a disabled adapter.

A model of the standalone form (`standalone`) is quantized already: nothing is computed there, and the adapter takes
over the part of low rank that stands beside Q.

Source: LQ-LoRA (Guo, Greengard, Xing, Kim, arXiv 2311.12023).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import Tensor, nn

from peft_zoo import registration
from peft_zoo.adapters.base.state_dict import SavedInsideFsdp
from peft_zoo.adapters.lq_lora_config import LqLoraConfig, nf_config
from peft_zoo.adapters.lq_lora_layer import LqLinear
from peft_zoo.adapters.lq_lora_linear import Factors, NFLinear, beside, empty_nf_linear
from peft_zoo.adapters.lq_lora_plan import plan, rank_of, split
from peft_zoo.adapters.lq_lora_targets import outside_adapters, refuse_packed
from peft_zoo.kernels.normal_float import NFConfig

PREFIX = "base_model.model."


@registration.register(
    LqLoraConfig,
    summary="LQ-LoRA: the base quantized to a budget of bits, its loss taken up by the LoRA that is trained.",
    parameters="r·(in + out)",
    memory="as LoRA: T·r; the base layer in 2 to 8 bits a number",
    flops="as LoRA: 4·T·in·out + 6·T·r·(in + out), and the weight restored twice",
    paper="LQ-LoRA, arXiv 2311.12023",
)
class LqLoraModel(SavedInsideFsdp, LoraModel):
    """peft's LoRA on linear layers that it quantizes first."""

    # ---- making layers ----

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if config.lq_state == "new":
            return
        others = [other for other in self.peft_config.values() if other is not config]
        digests = dict.fromkeys(name for name, way in (config.qconfig_map or {}).items() if way)
        digests |= config.base_sha256 or {}
        if others:
            present = {name: _hash(layer.quantized) for name, layer in _layers(self.model)}
        else:
            present = {name: _hash(layer) for name, layer in _alone(self.model) if name in digests}
        for name in digests if others else present:
            if present.get(name) != digests[name]:
                raise ValueError(
                    f"base_sha256: this adapter belongs to another quantized matrix of {name} than that of the model; "
                    "load it onto a base model of its own."
                )
        if others:
            self._warn_of_holes(present.keys() - digests.keys())

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Decide how each matrix is quantized, before anything is changed."""
        super()._prepare_model(peft_config, model)
        modules = dict(model.named_modules())
        for name in (name for name, way in (peft_config.qconfig_map or {}).items() if way and name in modules):
            refuse_packed(name, modules[name])
        if peft_config.lq_state == "decomposed" or not peft_config.init_lora_weights:
            return
        if len(self.peft_config) == 1:
            ways = self._ways_alone(peft_config, model)
            plan(peft_config, model, self._check_target_module_exists)
            if ways:
                peft_config.qconfig_map = {**ways, **(peft_config.qconfig_map or {})}
            return
        # Other adapters count on the matrices as they are: a further one quantizes nothing.
        expanded = _maybe_include_all_linear_layers(peft_config, model)
        layers = dict(_layers(model))
        own = {name: layer for name, layer in layers.items() if self._check_target_module_exists(expanded, name)}
        self._warn_of_holes(layers.keys() - own.keys())
        peft_config.qconfig_map = {name: list(layer.quantized.config) for name, layer in own.items()}
        peft_config.keep_init = any(layer.quantized.initial is not None for layer in own.values())

    def _ways_alone(self, config: LqLoraConfig, model: nn.Module) -> dict[str, list[Any]]:
        """How the targeted matrices are quantized that are so already, in a model of the standalone form."""
        expanded = _maybe_include_all_linear_layers(config, model)
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

    def _warn_of_holes(self, missed: Collection[str]) -> None:
        layers = dict(_layers(self.model))
        names = sorted(name for name in missed if layers[name].quantized.initial is None)
        if names:
            warnings.warn(
                f"{names[0]} (and {len(names) - 1} more) is quantized and the new adapter does not target it; it lacks "
                "what was split off while only that adapter is active. Target it too, or make the first with "
                "keep_init=True.",
                stacklevel=2,
            )

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

    @staticmethod
    def _quantized(
        config: LqLoraConfig, way: NFConfig, layer: nn.Module, name: str, fresh: bool
    ) -> tuple[nn.Module, Factors | None]:
        """What an adapter goes around in the place of a layer, and where it starts unless its values are in a file."""
        loaded = config.lq_state == "decomposed"
        if isinstance(layer, NFLinear) and (fresh or loaded):
            base, factors = beside(layer, config.keep_init)
            return base, factors if fresh else None
        if fresh:
            return split(config, way, layer, rank_of(config, name, layer), name)
        return (empty_nf_linear(layer, way, 0 if config.keep_init else None) if loaded else layer), None

    def _factors_of_another(self, layer: LqLinear) -> Factors | None:
        """Where a further adapter starts: as the first one did, or where that is not kept, from where it is now."""
        if layer.quantized.initial is not None or not layer.lora_A:
            return layer.quantized.initial
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
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        if config.lq_state == "new" and config.init_lora_weights:
            own = ((name, layer) for name, layer in _layers(model) if adapter_name in layer.lora_A)
            config.base_sha256 = {name: _hash(layer.quantized) for name, layer in own}

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
        if any(layer.quantized.initial is None for _, layer in _layers(self.model)):
            warnings.warn(
                "The adapter of LQ-LoRA holds a part of the base model, which is missing while it is disabled; make it "
                "with keep_init=True to have that part stand in for it.",
                stacklevel=2,
            )
        super().disable_adapter_layers()

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
        """As a LoRA, and the quantized matrices, merged or not."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        prefix = PREFIX if isinstance(model, PeftModel) else ""
        for name, layer in _layers(model):
            if adapter_name in layer.lora_A:
                found.update((f"{prefix}{name}.base_layer.{part}", tensor) for part, tensor in layer.quantized.saved())
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As a LoRA; the quantized matrices must be those that the configuration names.

        Raises:
            ValueError: If they are not, or one is missing.
        """
        for name, layer in _layers(model):
            if adapter_name in layer.lora_A:
                _check_saved(name, layer.quantized, config, state_dict)
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


def _check_saved(name: str, layer: NFLinear, config: LqLoraConfig, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse what a file has for a layer if it is not the whole or not of this base; make room for the factors kept."""
    found = {}
    for part, _ in layer.saved():
        keys = [f"{prefix}{name}.base_layer.{part}" for prefix in (PREFIX, "")]
        tensor = next((state_dict[key] for key in keys if key in state_dict), None)
        if tensor is None:
            raise ValueError(f"{keys[0]} is missing: the file of the adapter is not complete; save it again.")
        found[part] = tensor
    expected = (config.base_sha256 or {}).get(name)
    if _digest(found[part] for part in layer.PARTS) != expected:
        raise ValueError(
            f"{name}: the quantized matrix is not that of base_sha256={expected!r}; file and configuration do not "
            "belong together, or the file is damaged."
        )
    for part in layer.INITIAL:
        if part in found and getattr(layer, part).shape != found[part].shape:
            setattr(layer, part, torch.empty_like(found[part], device=layer.weight.device))


def _hash(layer: NFLinear) -> str:
    return _digest(layer.packed)


def _digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


__all__ = ["LqLoraModel"]
