"""Merging for peft's LoRA layers: rounded once from float32, and unmerging restores the bits of the base layer.

peft adds and subtracts the update in the dtype of the weights, so each cycle changes them for good. Updates that are
products of factors are added by `kernels.lora.merge_lora`, which holds neither the update nor a float32 weight.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from peft_zoo.adapters.base.offload import loaded
from peft_zoo.adapters.base.snapshot import Snapshot
from peft_zoo.adapters.base.weighted import parameters_of
from peft_zoo.kernels.lora.merge import merge_lora

FLOATING = (Linear, Embedding, Conv1d, Conv2d, Conv3d, ParamWrapper)
"""peft's LoRA layers around floating-point weights; its other classes replace a quantized weight by a new one."""


def with_exact_merge(layer: nn.Module) -> nn.Module:
    """Makes a LoRA layer of peft merge exactly, and returns it; layers of other packages stay as they are."""
    peft_class: Any = type(layer)
    if isinstance(layer, LoraLayer) and peft_class.__module__.startswith("peft."):
        layer.__class__ = _exact(peft_class)
    return layer


@functools.cache
def _exact(peft_class: Any) -> Any:
    """Returns the subclass with exact merging, under the same name."""
    return type(peft_class.__name__, (ExactMerge, peft_class), {"__module__": __name__, "peft_class": peft_class})


def _new(peft_class: Any) -> Any:
    cls = _exact(peft_class)
    return cls.__new__(cls)


class ExactMerge(LoraLayer if TYPE_CHECKING else object):  # type: ignore[misc]  # else `__class__` cannot be assigned
    """Mixin before one of peft's LoRA layers.

    Attributes:
        peft_class: The layer's class in peft.
    """

    peft_class: type[Any]
    _caches: dict[str, Any]
    _snapshot: Snapshot | None = None
    _bias: Tensor | None = None  # of the base layer before the merge, where `lora_bias` changes it

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *rest = super().__reduce_ex__(protocol)
        return _new, (self.peft_class,), *rest

    def get_base_weight(self) -> Tensor:
        """Returns the data of the weight, or of the targeted parameter."""
        return getattr(self.get_base_layer(), self._weight_name).data

    @property
    def _weight_name(self) -> str:
        return getattr(self, "parameter_name", "weight")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the updates of adapters, by default the active ones, to the base weight, in float32 and rounded once.

        If a merge fails, as one with `safe_merge` may, the layer stays as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.scaling]
        if not names:
            return
        with loaded(self.get_base_layer(), changed=True):
            self._merge_loaded(safe_merge, names)

    def _merge_loaded(self, safe_merge: bool, names: list[str]) -> None:
        base: Any = self.get_base_layer()
        before, snapshot, bias = [*self.merged_adapters], self._snapshot, self._bias
        if snapshot is None:
            self._snapshot = Snapshot(self, is_packed=self.peft_class not in FLOATING)
            bias_now = getattr(base, "bias", None)
            self._bias = bias_now.detach().clone() if isinstance(bias_now, Tensor) else None
        try:
            if self.peft_class in FLOATING and self.get_base_weight().dtype.itemsize >= 2:
                self._merge(safe_merge, [*before, *names])
            else:  # peft quantizes the sum again
                super().merge(safe_merge, names)
        except BaseException:
            if self.merged_adapters != before:
                self.unmerge()
                self.merge(adapter_names=before)
            self._snapshot, self._bias = snapshot, bias
            raise

    @torch.no_grad()
    def _merge(self, safe_merge: bool, names: list[str]) -> None:
        """Writes the weight and bias with the updates of all of `names`, merged earlier or not."""
        base: Any = self.get_base_layer()
        if getattr(base, "groups", 1) > 1:
            raise NotImplementedError(
                f"{type(base).__name__} has groups={base.groups}: peft does not merge a LoRA of a grouped convolution."
            )
        assert self._snapshot is not None
        original = self._snapshot.weight()
        weight = self._plus_products(names, original)
        if weight is None:
            with self._in_float32(names, original):
                weight = self.get_base_weight()
                for name in names:
                    weight = self._plus_update(name, weight)
        added = [_wide(self.lora_B[name].bias) * self.scaling[name] for name in names if self.lora_bias[name]]
        if added and self._bias is None:
            raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
        bias = sum(added, start=self._bias.float()) if added and self._bias is not None else None
        if safe_merge and not all(torch.isfinite(value).all() for value in (weight, bias) if value is not None):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        self._snapshot.write(weight.to(self.get_base_weight().dtype))
        if bias is not None:
            base.bias.data.copy_(bias)
        self.merged_adapters = names

    def _plus_products(self, names: list[str], original: Tensor) -> Tensor | None:
        """Returns a copy of the weight with the updates of adapters; None if they are not products of their factors.

        Those of variants of LoRA, such as DoRA, are not. Factors that are wider than the weight, and tensors of other
        classes, such as sharded ones, are left to torch.
        """
        pairs = [tuple(factor.detach() for factor in parameters_of(self, name)) for name in names]
        is_variant = any(self.lora_variant.get(name) is not None for name in names)
        wide = torch.promote_types(original.dtype, torch.float32).itemsize
        is_plain = all(type(f) is Tensor and f.dtype.itemsize <= wide for pair in pairs for f in (original, *pair))
        if is_variant or not is_plain or (isinstance(self, ParamWrapper) and self.num_experts < original.dim() - 1):
            return None
        weight = original.clone(memory_format=torch.contiguous_format)
        scales = [self.scaling[name] for name in names]
        for matrix, factors in self._products(weight, pairs):
            B, A = zip(*factors, strict=True)
            merge_lora(matrix, A, B, scales, inplace=True)
        return weight

    def _products(self, weight: Tensor, pairs: list[Any]) -> Iterator[tuple[Tensor, list[Any]]]:
        """Yields views of a weight as matrices `(out, in)`, with their factors B and A of each adapter."""
        experts = getattr(self, "num_experts", 1)
        if experts == 1:
            is_transposed = isinstance(self, Embedding) or getattr(self, "fan_in_fan_out", False)
            matrix = weight.mT if is_transposed else weight.flatten(1)
            yield matrix, [(B.flatten(1), A.flatten(1)) for B, A in pairs]
            return
        stacked: Any = self
        pairs = [(B.reshape(len(B), -1, experts), A.reshape(experts, -1, A.shape[1])) for B, A in pairs]
        for expert, matrix in enumerate(weight):  # B is (out, r, experts), A (experts, r, in)
            is_swapped = stacked._did_swap_in_out_features
            yield matrix if is_swapped else matrix.mT, [(B[..., expert], A[expert]) for B, A in pairs]

    def _plus_update(self, name: str, weight: Tensor) -> Tensor:
        """Returns a weight with the update of one more adapter; DoRA scales what the weight has from others, too."""
        variant = self.lora_variant.get(name)
        if variant is None:
            return weight + self.get_delta_weight(name)
        getattr(self.get_base_layer(), self._weight_name).data = weight
        return variant.merge_safe(self, name, weight.clone())

    @contextmanager
    def _in_float32(self, names: list[str], original: Tensor) -> Iterator[None]:
        """Gives the base layer its original weight and, like the adapters, at least float32 in the block.

        Variants of LoRA read the weight of the base layer, and its unmerged weight from the cache.
        """
        weight = getattr(self.get_base_layer(), self._weight_name)
        parameters = [p for container in self.adapter_layer_names for p in _parameters(getattr(self, container), names)]
        data = [(parameter, parameter.data) for parameter in (weight, *parameters)]
        merged = self.merged_adapters
        caches: dict[str, Any] = {**self._caches}
        try:
            weight.data, self.merged_adapters = original, []
            for parameter, _ in data:
                parameter.data = _wide(parameter.data)
            self._cache_store("unmerged_base_weight", weight.data)
            yield
        finally:
            for parameter, value in data:
                parameter.data = value
            self.merged_adapters, self._caches = merged, caches

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the bits that the base layer had before the first merge."""
        if self._snapshot is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: Any = self.get_base_layer()
        with loaded(base, changed=True):
            self._snapshot.restore()
            if self._bias is not None:
                base.bias.data.copy_(self._bias)
        self._snapshot = self._bias = None
        self.merged_adapters.clear()


def _wide(tensor: Tensor) -> Tensor:
    """Returns a tensor in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _parameters(container: Any, names: list[str]) -> Iterator[nn.Parameter]:
    for name in names:
        if name in container:
            entry = container[name]
            yield from [entry] if isinstance(entry, nn.Parameter) else entry.parameters()
