"""Support of peft's own adapters on `NFLinear`, such as on a standalone quantized model.

peft keeps a closed list of quantized layers. Handlers for `peft_patches` add `NFLinear` to it, for every method that
asks for the quantization backend of a layer; peft's LoRA has a layer class for each kind of base layer, hence
`NFLoraLinear`. Merging replaces the quantized layer by a floating-point one, since quantizing the sum would lose what
was trained, and unmerging restores it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from peft_zoo import peft_patches
from peft_zoo.adapters.lq_lora.layer import LqLinear
from peft_zoo.adapters.lq_lora.nf_linear import NFLinear, weight_matrix
from peft_zoo.kernels.normal_float.linear import nf_merge

Model = TypeVar("Model", bound=nn.Module)

NEEDS_FLOATS = ("LOHA", "LOKR", "HRA", "DELORA", "HIRA", "PSOFT", "TINYLORA", "SUPERTUNING", "DEFT", "PEANUT", "FROD")
"""peft's methods that read the base weight directly instead of asking for a backend."""

INITS = ("gaussian", "eva")
"""Values of peft's `init_lora_weights` that do not need the base weight."""


class NFBackend(QuantizationBackend):
    """Reads and replaces the weight of an `NFLinear`."""

    layer_type = "linear"
    supports_merge = True
    backend_name = "nfk"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """Returns the weight `(out, in)` of an `NFLinear`, rounded once, or of the layer in its place."""
        if isinstance(base_layer, NFLinear):
            return floating_weight(base_layer)
        return weight_matrix(base_layer).data

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Replaces the quantized layer by a floating-point one with a weight `(out, in)`.

        Once no adapter is merged, the quantized layer is restored instead.
        """
        owner = innermost(peft_layer)
        base = owner.base_layer
        if isinstance(base, NFLinear):
            owner._replaced = _Replaced(base, [peft_layer])
        elif peft_layer not in owner._replaced.merged:
            owner._replaced.merged.append(peft_layer)
        elif not peft_layer.merged_adapters:  # peft unmerges one after the other, and this was its last
            owner._replaced.merged.remove(peft_layer)
            if not owner._replaced.merged:
                owner.base_layer = owner._replaced.layer.to(base.weight.device, base.weight.dtype)
                del owner._replaced
                return
        owner.base_layer = owner._replaced.layer.to_floating(weight_data.detach())


@dataclass
class _Replaced:
    """A quantized layer that merging has replaced, outside the module tree, and the adapter layers merged into it."""

    layer: NFLinear
    merged: list[nn.Module]


def innermost(layer: Any) -> Any:
    """Returns the adapter layer next to the base layer; mixed models nest adapter layers."""
    while isinstance(layer.base_layer, BaseTunerLayer):
        layer = layer.base_layer
    return layer


class NFLoraLinear(LoraLinear):
    """peft's LoRA layer around an `NFLinear`; the initial factors stay in the `NFLinear`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.fan_in_fan_out = False  # Q is (out, in) also where the layer was a Conv1D
        self._is_floating = False
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.quantization_backend = NFBackend()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges as peft does, into a floating-point layer; if one of several adapters fails, none is merged."""
        with self._floating():
            super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Restores the quantized layer, with the same bits."""
        with self._floating():
            super().unmerge()

    @contextmanager
    def _floating(self) -> Iterator[None]:
        """Replaces the base layer by a plain `nn.Linear` in the block, as peft's arithmetic requires.

        Variants of LoRA unmerge and merge again inside a merge; nested blocks use the same layer.
        """
        if self._is_floating:
            yield
            return
        owner, before, backend = innermost(self), [*self.merged_adapters], NFBackend()
        base = owner.base_layer
        plain = nn.Linear(1, 1, device="meta")
        weight, bias = backend.get_base_weight(base), base._parameters["bias"]
        # Copies, because peft adds in place, and a failed merge must change nothing.
        plain.weight = nn.Parameter(weight if isinstance(base, NFLinear) else weight.clone(), requires_grad=False)
        plain._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        owner.base_layer, self._is_floating = plain, True
        try:
            yield
        except BaseException:
            self.merged_adapters[:] = before
            raise
        finally:
            owner.base_layer, self._is_floating = base, False
        if self.merged_adapters != before:
            backend.set_base_weight(self, plain.weight)
            if not isinstance(owner.base_layer, NFLinear):  # which has its own bias
                owner.base_layer._parameters["bias"] = plain._parameters["bias"]


def floating_weight(layer: NFLinear, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the weight `(out, in)` that a layer multiplies with, rounded once; `dtype`: as before quantization."""
    dtype = dtype or layer.dtype
    factors = layer.initial if layer.use_initial else None
    if factors is None:
        return layer.dense(dtype)
    B, A = factors
    return nf_merge(layer.packed, layer.config, A, B, dtype=dtype)


def dequantize_model(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Replaces the quantized layers of a model by floating-point ones, by default of the dtype before quantization.

    Raises a ValueError if one of the layers has an adapter; the model is unchanged then.
    """
    layers = quantized_layers(model)
    adapted = next((name for name in layers if name.endswith(".base_layer")), None)
    if adapted is not None:
        raise ValueError(f"{adapted}: has an adapter; unload or merge the adapter before `.dequantize()`.")
    for name, layer in layers.items():
        model.set_submodule(name, layer.to_floating(floating_weight(layer, dtype)))
    return model


def quantized_layers(model: nn.Module) -> dict[str, NFLinear]:
    """Returns every quantized layer by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NFLinear)}


# ---- handlers for functions of peft ----


def _lora_layer(target: Any, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """Handles the choice of LoRA's layer class for a base layer."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, NFLinear) or kwargs.get("parameter_name") is not None:
        return None
    return NFLoraLinear(target, adapter_name, config, **kwargs)


def _check_merge(tuner: BaseTuner) -> None:
    """Refuses to merge methods that would add to the packed codes, before anything is changed."""
    for name, layer in tuner.model.named_modules():
        unsupported = isinstance(layer, BaseTunerLayer) and layer.quantization_backend is None
        if unsupported and not isinstance(layer, LqLinear) and isinstance(layer.get_base_layer(), NFLinear):
            raise ValueError(
                f"{name}: peft cannot merge a {type(tuner).__name__} into a quantized weight; load the base again, "
                "call its `.dequantize()`, and load the adapter onto it."
            )


def _check_new_adapter(tuner: BaseTuner, config: Any) -> None:
    """Refuses adapters that need a floating-point weight, or train the base layer, before anything is changed."""
    _check_modules_to_save(tuner.model, config)
    init = getattr(config, "init_lora_weights", True)
    if config.peft_type in NEEDS_FLOATS:
        what = f"a {type(tuner).__name__}"
    elif isinstance(init, str) and init not in INITS:
        what = f"init_lora_weights={init!r}"
    else:
        return
    names = (re.sub(r"(\.base_layer)+$", "", name) for name in quantized_layers(tuner.model))
    anywhere = config.target_modules in (None, "all-linear")
    name = next((name for name in names if anywhere or check_target_module_exists(config, name)), None)
    if name is not None:
        raise ValueError(
            f"{what} needs the weight of {name} in floating-point, and it is quantized; call the model's "
            "`.dequantize()` first, or use another method or initialization."
        )


def _check_modules_to_save(model: nn.Module, config: Any) -> None:
    """Refuses to train a copy of a quantized layer: packed codes have no gradient."""
    saved = tuple(getattr(config, "modules_to_save", None) or ())
    name = next((name for name in quantized_layers(model) if name.endswith(saved)), None)
    if name is not None:
        raise ValueError(
            f"modules_to_save={[*saved]}: {name} is quantized and cannot be trained; leave it out, or call the model's "
            "`.dequantize()` first."
        )


peft_patches.set_handlers(
    {
        "resolve_quantization_backend": lambda layer, **_: NFBackend() if isinstance(layer, NFLinear) else None,
        "dispatch_default": _lora_layer,
        # Variants of LoRA such as DoRA read the weight.
        "dequantize_module_weight": lambda layer: floating_weight(layer) if isinstance(layer, NFLinear) else None,
        "BaseTuner._check_new_adapter_config": _check_new_adapter,
        "BaseTuner._check_merge_allowed": _check_merge,
    }
)
