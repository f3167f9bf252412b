"""The base weight as it was before a merge, to the bit."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from peft_zoo.adapters.base.layer import ZooLayer


class Snapshot:
    """Remembers the base weight of a layer, writes merged weights in its place and restores it.

    A plain weight is copied, and written in place so that tied and tracked references stay valid. Quantizing a weight
    again would not give the same bits, so of a quantized layer the packed weight itself is kept: the backends put a new
    one in its place.

    Args:
        layer: An adapter layer with nothing merged.

    Raises:
        ValueError: If bitsandbytes has brought a 4-bit weight into a form that cannot be read back.
    """

    def __init__(self, layer: ZooLayer) -> None:
        self._layer = (layer,)  # in a tuple, so that pickling and deep copies follow it but nn.Module does not
        if layer.quantization_backend is None:
            self._original = layer.get_base_weight().clone()
        else:
            self._module = layer.base_layer
            base = layer.get_base_layer()
            made_anew = isinstance(getattr(type(base), "weight", None), property)  # by a layer that holds its own bits
            self._packed: Any = None if made_anew else getattr(base, "weight", None)
            _refuse_repacked(self._packed)
            self._attributes = dict(getattr(self._packed, "__dict__", {}))
            self._state = copy.copy(getattr(base, "state", None))

    def weight(self) -> Tensor:
        """The original weight as a float tensor, dequantized if need be; not to be changed."""
        (layer,) = self._layer
        if layer.quantization_backend is None:
            return self._original
        if layer.merged:
            self.restore()
        return layer.get_base_weight()

    def write(self, merged: Tensor) -> None:
        """Put a merged weight in the place of the original."""
        (layer,) = self._layer
        if layer.quantization_backend is None:
            layer.get_base_weight().copy_(merged)
        else:
            layer.set_base_weight(merged)

    def restore(self) -> None:
        """Put the original back."""
        (layer,) = self._layer
        if layer.quantization_backend is None:
            layer.get_base_weight().copy_(self._original)
            return
        layer.base_layer = self._module  # HQQ and NormalFloat put a new layer in its place
        base = layer.get_base_layer()
        if self._packed is not None:
            if "weight" in vars(base):
                del base.weight
            base.weight = self._packed
            vars(self._packed).update(self._attributes)  # bitsandbytes marks the old weight as not quantized
        if self._state is not None:
            base.state = self._state


def _refuse_repacked(weight: Any) -> None:
    """On CPUs with avx512bf16, the first forward pass repacks a 4-bit weight, and then it dequantizes to nonsense."""
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has repacked the 4-bit weight for this CPU in an earlier forward pass, so it cannot be "
            "merged into. Add the adapter before the model's first forward pass."
        )
