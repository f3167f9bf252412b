"""The layers of LQ-LoRA: a linear layer whose weight is in NormalFloat, and the LoRA around it.

The quantized matrix Q is in buffers, which no optimizer sees and a state dict does. A LoRA is merged into a copy in
floating-point; the packed bits stay and come back when it is unmerged.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_zoo.kernels.low_rank import truncate_factors
from peft_zoo.kernels.nf_linear import SMALL, nf_linear, nf_merge
from peft_zoo.kernels.normal_float import NFConfig, NFTensor, dequantize, empty_nf

Factors = tuple[Tensor, Tensor]
"""B `(out, r)` and A `(r, in)` in float32, whose product is the part of low rank, scaling included."""


class NFLinear(nn.Linear):
    """A frozen linear layer `x Q^T + b` with Q in NormalFloat.

    Args:
        weight: Q, `(out, in)`; tensors on the meta device wait for a state dict.
        config: That it was quantized with.
        shape: Of Q.
        bias: `(out,)`, taken over as it is.
        dtype: Of the weight before, and of what is merged.
        transposed: Whether the layer before was transformers' `Conv1D`, which has `(in, out)`.
        initial: B and A that were split off, where they are kept; also as an empty pair to be filled.

    Attributes:
        weight: The packed codes: what peft asks for device and dtype. An integer dtype keeps adapters in float32.
    """

    PARTS = NFTensor._fields
    INITIAL = ("initial_B", "initial_A")

    codes: Tensor
    initial_B: Tensor | None
    initial_A: Tensor | None

    def __init__(
        self,
        weight: NFTensor,
        config: NFConfig,
        shape: tuple[int, int],
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
        initial: Factors | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear would make a weight
        self.out_features, self.in_features = shape
        self.config, self.dtype, self.transposed = config, dtype, transposed
        for name, part in zip(self.PARTS, weight, strict=True):
            self.register_buffer(name, part)
        for name, factor in zip(self.INITIAL, initial or (None, None), strict=True):
            self.register_buffer(name, None if factor is None else factor.contiguous())
        self._parameters["bias"] = bias  # not by assignment: where peft makes new parameters empty, this is none

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.codes

    @property
    def packed(self) -> NFTensor:
        """Q as the kernels take it."""
        return NFTensor(*(getattr(self, name) for name in self.PARTS))

    @property
    def shape(self) -> tuple[int, int]:
        """Of Q."""
        return self.out_features, self.in_features

    @property
    def initial(self) -> Factors | None:
        """B and A that were split off, if they are kept."""
        return None if self.initial_B is None or self.initial_A is None else (self.initial_B, self.initial_A)

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of everything that an adapter's file has to hold."""
        for name in (*self.PARTS, *self.INITIAL):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Q restored."""
        return dequantize(self.packed, self.config, self.shape, dtype)

    def plus(self, B: Tensor, A: Tensor) -> Tensor:
        """`Q + B A` in the dtype of the weight before, rounded once."""
        return nf_merge(self.packed, self.config, A, B, dtype=self.dtype)

    def forward(self, x: Tensor, A: Tensor | None = None, B: Tensor | None = None, scaling: float = 1.0) -> Tensor:
        """`x Q^T + b`, and with A and B `+ scaling x A^T B^T` in the same kernel; see `nf_linear`."""
        return nf_linear(x, self.packed, self.config, self.shape, self.bias, A, B, scaling)

    def floating(self, weight: Tensor) -> nn.Module:
        """An ordinary layer of the kind that was quantized, with a weight `(out, in)` and this bias."""
        layer: Any
        if self.transposed:
            layer = Conv1D(1, 1)
            layer.nf, layer.nx = self.shape
            layer.weight = nn.Parameter(weight.mT.contiguous(), requires_grad=False)
        else:
            layer = nn.Linear(1, 1, device="meta")
            layer.out_features, layer.in_features = self.shape
            layer.weight = nn.Parameter(weight, requires_grad=False)
        layer._parameters["bias"] = self.bias
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """The sizes, and how Q is quantized."""
        return f"{super().extra_repr()}, config={tuple(self.config)}"

    def _apply(self, fn: Any, recurse: bool = True) -> NFLinear:
        """Move, but keep the dtypes: scales in another dtype are another matrix."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self


def empty_nf_linear(layer: Any, config: NFConfig, keep_init: bool) -> NFLinear:
    """An `NFLinear` in the place of a layer, to be filled from a state dict.

    Args:
        layer: `nn.Linear` or `Conv1D`; its weight's device and dtype are taken.
        config: How the matrix is quantized.
        keep_init: Whether it has initial factors, of a rank that the state dict knows.
    """
    matrix = oriented(layer)
    (rows, columns), device = matrix.shape, matrix.device
    factors = torch.zeros(rows, 0, device=device), torch.zeros(0, columns, device=device)
    packed = empty_nf(config, rows * columns, device)
    transposed, initial = isinstance(layer, Conv1D), factors if keep_init else None
    return NFLinear(packed, config, (rows, columns), layer.bias, matrix.dtype, transposed, initial)


def oriented(layer: Any) -> Tensor:
    """The weight of a layer as `(out, in)`."""
    return layer.weight.mT if isinstance(layer, Conv1D) else layer.weight


class LqLinear(LoraLinear):
    """peft's LoRA around an `NFLinear`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        self._set_aside: list[NFLinear] = []  # the quantized layer while one in floating-point is in its place
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False  # Q is (out, in) whatever the layer was

    @property
    def quantized(self) -> NFLinear:
        """The base layer, merged or not."""
        layer: Any = self._set_aside[0] if self._set_aside else self.base_layer
        return layer

    # ---- where training starts ----

    def start(self, adapter_name: str, factors: Factors) -> None:
        """Give an adapter its first values: `scaling B A` is the product of `factors`, cut or filled up to its rank."""
        down, up = self.adapter_weights(adapter_name)
        if down.is_meta:
            return  # they come from a file
        B, A = factors
        rank, root = len(down), math.sqrt(abs(self.scaling[adapter_name]))
        if rank < len(A):
            B, A = truncate_factors(B, A, rank)[:2]
        with torch.no_grad():
            up.zero_()
            up[:, : len(A)] = B / math.copysign(root, self.scaling[adapter_name])
            down[: len(A)] = A / root

    def adapter_weights(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A and B as they are trained."""
        down: Any = self.lora_A[adapter_name]
        up: Any = self.lora_B[adapter_name]
        return down.weight, up.weight

    def factors(self, adapter_name: str) -> Factors:
        """B and A of an adapter in float32, with its scaling in B."""
        A, B = self.adapter_weights(adapter_name)
        return B.detach().float() * self.scaling[adapter_name], A.detach().float()

    # ---- forward ----

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """peft's, with the LoRA inside of the quantized product where a few tokens are generated."""
        names = kwargs.get("adapter_names")
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._disabled(x)
        if names is None and not self.merged and not any(name in self.lora_A for name in self.active_adapters):
            return self._disabled(x)
        only = self._only_adapter(x) if names is None and not self.merged else None
        if only is not None:
            return self.quantized(x, *self.adapter_weights(only), self.scaling[only])
        result = super().forward(x, *args, **kwargs)
        if names is not None and "__base__" in names:
            here = [index for index, name in enumerate(names) if name == "__base__"]
            result[here] = self._disabled(x[here])
        return result

    def _disabled(self, x: Tensor) -> Tensor:
        """The layer without adapters: Q and, where they are kept, the factors that were split off."""
        B, A = self.quantized.initial or (None, None)
        return self.quantized(x, A, B)

    def _only_adapter(self, x: Tensor) -> str | None:
        """The one active adapter, if nothing is trained and the kernel for few tokens takes all of it."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if torch.is_grad_enabled() or self.training or len(active) != 1 or x.shape[:-1].numel() > SMALL:
            return None
        (name,) = active
        # A subclass shards its weight (FSDP), a hook wants to see the product.
        plain = all(type(m) is nn.Linear and not m._forward_hooks for m in (self.lora_A[name], self.lora_B[name]))
        return name if plain and name not in self.lora_variant and not self.lora_bias[name] else None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: a LoRA of the same values belongs to Q, and the base model of a LoRA is the one before quantizing."""
        return False

    # ---- merging ----

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put a layer in floating-point, of the dtype before quantizing, in the place of the quantized one.

        Args:
            safe_merge: Refuse weights that are not finite.
            adapter_names: What is merged; by default what is active.

        Raises:
            ValueError: If `safe_merge` is set and a weight is not finite; nothing is changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        together = [*self.merged_adapters, *names]
        weight = self._merged_weight(together)
        bias = self._merged_bias(together)
        finite = torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())
        if safe_merge and not finite:
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
        quantized = self.quantized
        layer = quantized.floating(weight)
        if bias is not None:
            layer._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
        self._set_aside = [quantized]
        self.base_layer = layer
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take the quantized layer back, as it was to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        merged: Any = self.base_layer
        self.base_layer = self._set_aside.pop().to(merged.weight.device)
        self.merged_adapters.clear()

    def _merged_weight(self, names: list[str]) -> Tensor:
        B, A = zip(*map(self.factors, names), strict=True)
        return self.quantized.plus(torch.cat(B, 1), torch.cat(A))

    def _merged_bias(self, names: list[str]) -> Tensor | None:
        """The bias with those of adapters that have one (`lora_bias`)."""
        added = [self.lora_B[name].bias * self.scaling[name] for name in names if self.lora_bias[name]]
        bias = self.quantized.bias
        if not added:
            return None
        if bias is None:
            raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
        return (bias + torch.stack(added).sum(0)).to(bias.dtype).detach()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The layer that takes the place of this one: merged in floating-point, or without the adapter.

        What is left without the adapter is Q, or with kept initial factors the weight before, as far as it is known.
        """
        if self.merged and not merge:
            self.unmerge()
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return self.base_layer
        quantized = self.quantized
        if quantized.initial is None:
            return quantized
        return quantized.floating(quantized.plus(*quantized.initial))

    def __repr__(self) -> str:
        return f"lq_{super().__repr__()}"


__all__ = ["NFLinear"]
