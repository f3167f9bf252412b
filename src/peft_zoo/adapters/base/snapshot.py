"""A bit-exact copy of the base weight from before a merge."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from peft_zoo.adapters.base.offload import loaded

if TYPE_CHECKING:
    from peft_zoo.adapters.base.exact_merge import ExactMerge
    from peft_zoo.adapters.base.layer import ZooLayer


def refuse_computed_weight(layer: Any, path: str = "") -> None:
    """Raises a ValueError if the base layer computes its weight in each forward pass: merging into it would be lost.

    So do `torch.nn.utils.parametrize`, as `weight_norm` uses it, and the hooks of older norms and of pruning.
    """
    base, name = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
    is_hooked = name not in base._parameters and any(f"{name}_{end}" in base._parameters for end in ("orig", "g", "v"))
    if is_parametrized(base, name) or is_hooked:
        raise ValueError(
            f"module {path or type(base).__name__}: its {name} is computed in each forward pass "
            f"(weight_norm, pruning or another parametrization), so merging into it would be lost. Make it a plain "
            f"parameter first, for example with torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})."
        )


class Snapshot:
    """Saves the base weight of a layer without merged adapters, replaces it by a merged weight and restores it.

    A plain weight is copied, and written in place so that references to it stay valid. A packed weight of a quantized
    layer is kept itself, since quantizing again would not give the same bits; merging replaces it by a new one.

    Args:
        layer: Adapter layer.
        is_packed: Whether the weight is quantized; default: whether the layer has a backend for such weights.
    """

    def __init__(self, layer: ZooLayer | ExactMerge, is_packed: bool | None = None) -> None:
        self._layer = (layer,)  # in a tuple: nn.Module must not register it, pickle and deepcopy must follow it
        self._is_packed = layer.quantization_backend is not None if is_packed is None else is_packed
        if not self._is_packed:
            refuse_computed_weight(layer, getattr(layer, "path", ""))
            with loaded(layer.get_base_layer()):
                self._original = layer.get_base_weight().clone()
        else:
            self._module = layer.base_layer
            base = layer.get_base_layer()
            is_computed = isinstance(getattr(type(base), "weight", None), property)  # NormalFloat stores codes instead
            self._packed: Any = None if is_computed else getattr(base, "weight", None)
            # A forward pass on a CPU with avx512bf16 repacks a 4-bit weight, which then no longer dequantizes.
            if getattr(getattr(self._packed, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    "bitsandbytes has repacked the 4-bit weight for this CPU in an earlier forward pass, so it cannot "
                    "be merged into. Add the adapter before the model's first forward pass."
                )
            self._attributes = dict(getattr(self._packed, "__dict__", {}))
            self._state = copy.copy(getattr(base, "state", None))

    def weight(self) -> Tensor:
        """Returns the original weight as a float tensor, dequantized if necessary; do not modify it."""
        (layer,) = self._layer
        if not self._is_packed:
            return self._original
        if layer.merged:
            self.restore()
        return layer.get_base_weight()

    def write(self, merged: Tensor) -> None:
        """Replaces the original by a merged weight."""
        (layer,) = self._layer
        if not self._is_packed:
            with loaded(layer.get_base_layer(), changed=True):
                layer.get_base_weight().copy_(merged)
        else:
            layer.set_base_weight(merged)

    def restore(self) -> None:
        """Restores the original weight."""
        (layer,) = self._layer
        if not self._is_packed:
            with loaded(layer.get_base_layer(), changed=True):
                layer.get_base_weight().copy_(self._original)
            return
        layer.base_layer = self._module  # HQQ and NormalFloat replace the layer
        base = layer.get_base_layer()
        if self._packed is not None:
            if "weight" in vars(base):
                del base.weight
            base.weight = self._packed
            vars(self._packed).update(self._attributes)  # bitsandbytes marks the old weight as not quantized
        if self._state is not None:
            base.state = self._state
