"""How peft reads and changes a matrix in NormalFloat: adapters other than LQ-LoRA's on a model of the standalone form.

peft keeps a closed list of the kinds of quantized layers it knows. Here `NFLinear` is added to it, for every method
that asks for the backend of a layer; peft's LoRA has a class of its own for each kind, and so for this one. Merging
puts a layer in floating-point in the place of the quantized one, and unmerging puts that back: quantizing the sum would
lose what is merged.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import integrations, quantization_utils
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from peft_zoo.adapters.lq_lora.layer import LqLinear
from peft_zoo.adapters.lq_lora.nf_linear import NFLinear, oriented
from peft_zoo.kernels.normal_float.linear import nf_merge

__all__: list[str] = []

Model = TypeVar("Model", bound=nn.Module)

NEEDS_FLOATS = ("LOHA", "LOKR", "HRA", "DELORA", "HIRA", "PSOFT", "TINYLORA", "SUPERTUNING", "DEFT", "PEANUT", "FROD")
"""peft's methods that read the weight itself, and do not ask how."""

INITS = ("gaussian", "eva")
"""Of peft's starts of a LoRA that have a name, those that leave the weight alone."""


class NFBackend(QuantizationBackend):
    """Reads and replaces the weight of an `NFLinear`."""

    layer_type = "linear"
    supports_merge = True
    backend_name = "nfk"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """What the layer multiplies with, `(out, in)`: Q and what stands beside it, rounded once.

        Args:
            base_layer: An `NFLinear`, or what is in its place while an adapter is merged.
        """
        if isinstance(base_layer, NFLinear):
            return dense(base_layer)
        return oriented(base_layer).data

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Put a layer in floating-point in the place of the quantized one, or that back if nothing is merged any more.

        Args:
            peft_layer: The adapter's layer.
            weight_data: `(out, in)`.
        """
        owner = innermost(peft_layer)
        base = owner.base_layer
        if isinstance(base, NFLinear):
            owner._aside = _Aside(base, [peft_layer])
        elif peft_layer not in owner._aside.merged:
            owner._aside.merged.append(peft_layer)
        elif not peft_layer.merged_adapters:  # peft unmerges one after the other, and this was its last
            owner._aside.merged.remove(peft_layer)
            if not owner._aside.merged:
                owner.base_layer = owner._aside.layer.to(base.weight.device, base.weight.dtype)
                del owner._aside
                return
        owner.base_layer = owner._aside.layer.floating(weight_data.detach())


@dataclass
class _Aside:
    """A quantized layer while another is in its place, where no state dict sees it, and whose adapters are in that."""

    layer: NFLinear
    merged: list[nn.Module]


def innermost(layer: Any) -> Any:
    """The adapter's layer that is right around the base layer: a mixed model has them in one another."""
    while isinstance(layer.base_layer, BaseTunerLayer):
        layer = layer.base_layer
    return layer


class NFLoraLinear(LoraLinear):
    """peft's LoRA around an `NFLinear` whose factors, if it has any, stay in it."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.fan_in_fan_out = False  # Q is (out, in) whatever the layer was
        self._open = False
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.quantization_backend = NFBackend()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As peft, into a layer in floating-point; where one of several fails, none is merged."""
        with self._floating():
            super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Take the quantized layer back, as it was to the bit."""
        with self._floating():
            super().unmerge()

    @contextmanager
    def _floating(self) -> Iterator[None]:
        """A plain `nn.Linear` in the place of the base layer, as peft's arithmetic wants it.

        Variants of LoRA unmerge and merge again inside of a merge; they do so on the layer that is there already.
        """
        if self._open:
            yield
            return
        owner, before, backend = innermost(self), [*self.merged_adapters], NFBackend()
        base = owner.base_layer
        plain = nn.Linear(1, 1, device="meta")
        weight, bias = backend.get_base_weight(base), base._parameters["bias"]
        # Copies, for peft adds in place, and what fails must leave nothing behind.
        plain.weight = nn.Parameter(weight if isinstance(base, NFLinear) else weight.clone(), requires_grad=False)
        plain._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        owner.base_layer, self._open = plain, True
        try:
            yield
        except BaseException:
            self.merged_adapters[:] = before
            raise
        finally:
            owner.base_layer, self._open = base, False
        if self.merged_adapters != before:
            backend.set_base_weight(self, plain.weight)
            if not isinstance(owner.base_layer, NFLinear):  # which has its own bias
                owner.base_layer._parameters["bias"] = plain._parameters["bias"]


def dense(layer: NFLinear, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix `(out, in)` that a layer multiplies with, rounded once to a dtype, or to the one the weight had."""
    dtype = dtype or layer.dtype
    factors = layer.initial if layer.standing else None
    if factors is None:
        return layer.dense(dtype)
    B, A = factors
    return nf_merge(layer.packed, layer.config, A, B, dtype=dtype)


def floating(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Put ordinary layers in the places of quantized ones.

    Args:
        model: Is changed.
        dtype: Of their weights; None for those from before quantizing.

    Raises:
        ValueError: If an adapter is around one of them; nothing is changed then.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NFLinear)}
    inside = next((name for name in layers if name.endswith(".base_layer")), None)
    if inside is not None:
        raise ValueError(f"{inside}: an adapter is around it; unload or merge the adapter before `.dequantize()`.")
    for name, layer in layers.items():
        model.set_submodule(name, layer.floating(dense(layer, dtype)))
    return model


# ---- what peft asks ----


def _backend(layer: Any, **kwargs: Any) -> QuantizationBackend | None:
    """For methods that read and write the weight by a backend."""
    return NFBackend() if isinstance(layer, NFLinear) else None


def _lora(target: Any, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """For LoRA, the last that it asks which class a layer gets."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, NFLinear) or kwargs.get("parameter_name") is not None:
        return None
    return NFLoraLinear(target, adapter_name, config, **kwargs)


def _dense(layer: Any) -> Tensor | None:
    """For variants of LoRA such as DoRA, which read the weight."""
    return dense(layer) if isinstance(layer, NFLinear) else None


def _check_merge(tuner: BaseTuner) -> None:
    """Refuse what would add to the packed codes, before anything is changed."""
    for name, layer in tuner.model.named_modules():
        unknown = isinstance(layer, BaseTunerLayer) and layer.quantization_backend is None
        if unknown and not isinstance(layer, LqLinear) and isinstance(layer.get_base_layer(), NFLinear):
            raise ValueError(
                f"{name}: peft cannot merge a {type(tuner).__name__} into a quantized matrix; load the base anew, call "
                "its `.dequantize()`, and load the adapter onto it."
            )


def _check_new(tuner: BaseTuner, config: Any) -> None:
    """Refuse what reads a weight in floating-point to begin with, or trains it, before anything is changed."""
    _check_saved_modules(tuner.model, config)
    init = getattr(config, "init_lora_weights", True)
    if config.peft_type in NEEDS_FLOATS:
        what = f"a {type(tuner).__name__}"
    elif isinstance(init, str) and init not in INITS:
        what = f"init_lora_weights={init!r}"
    else:
        return
    found = (_outside(name) for name, module in tuner.model.named_modules() if isinstance(module, NFLinear))
    anywhere = config.target_modules in (None, "all-linear")
    name = next((name for name in found if anywhere or check_target_module_exists(config, name)), None)
    if name is not None:
        raise ValueError(
            f"{what} needs the weight of {name} in floating-point, and it is quantized; call the model's "
            "`.dequantize()` first, or use another method or start."
        )


def _check_saved_modules(model: nn.Module, config: Any) -> None:
    """A copy of packed codes has nothing that could be trained."""
    saved = tuple(getattr(config, "modules_to_save", None) or ())
    name = next((n for n, module in model.named_modules() if n.endswith(saved) and isinstance(module, NFLinear)), None)
    if name is not None:
        raise ValueError(
            f"modules_to_save={[*saved]}: {name} is quantized and cannot be trained as a whole; leave it out, or call "
            "the model's `.dequantize()` first."
        )


def _outside(name: str) -> str:
    """The name that a layer had before there were adapters around it."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def _ask_first(ours: Callable[..., Any], home: Any, name: str) -> None:
    """Have a function of peft give our answer where we have one, in every module that has taken it already."""
    now = getattr(home, name)
    theirs = getattr(now, "before_peft_zoo", now)  # this module is imported anew

    @functools.wraps(theirs)
    def asked(*args: Any, **kwargs: Any) -> Any:
        found = ours(*args, **kwargs)
        return theirs(*args, **kwargs) if found is None else found

    asked.before_peft_zoo = theirs  # type: ignore[attr-defined]
    setattr(home, name, asked)
    for module in [*sys.modules.values()]:
        if isinstance(module, ModuleType) and vars(module).get(name) is now:
            setattr(module, name, asked)


_ask_first(_backend, quantization_utils, "resolve_quantization_backend")
_ask_first(_lora, lora_layer, "dispatch_default")
_ask_first(_dense, integrations, "dequantize_module_weight")
_ask_first(_check_new, BaseTuner, "_check_new_adapter_config")
_ask_first(_check_merge, BaseTuner, "_check_merge_allowed")
