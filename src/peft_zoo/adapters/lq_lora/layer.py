"""LoRA layer around a NormalFloat base layer.

Merging replaces the base layer by a floating-point one; the quantized layer is kept and returns when it is unmerged.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from peft_zoo.adapters.base.offload import loaded, offload_as, offload_hook
from peft_zoo.adapters.lq_lora.nf_linear import Factors, NFLinear
from peft_zoo.kernels.low_rank.factored import truncate_factors

FUSED_TOKENS = 32
"""Largest number of tokens for which base layer and LoRA are computed by one operator."""

WITHOUT_ADAPTER = (
    "without an adapter only the quantized weight Q is left: this LQ-LoRA was created with keep_init=False, so the "
    "low-rank part of the base weight is in the adapter alone, and the result would not be that of the base model. "
    "Create the adapter with keep_init='nf8', use a second copy of the base model as the reference, or pass "
    "quantized_only=True to `disable_adapter_layers`, `unload` or `merge_and_unload` of `model.base_model` to get Q."
)
"""Why a layer without initial factors does not compute without an adapter, and what to do."""


class LqLinear(LoraLinear):
    """peft's LoRA layer around an `NFLinear`.

    Attributes:
        quantized_only: Whether Q alone may stand for the layer without an adapter if the initial factors are not kept.
    """

    quantized_only = False

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        self._unmerged: list[NFLinear] = []  # the quantized layer while a merged one replaces it; no child module
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False  # Q is (out, in) also where the layer was a Conv1D

    @property
    def quantized(self) -> NFLinear:
        """The quantized base layer, whether merged or not."""
        layer: Any = self._unmerged[0] if self._unmerged else self.base_layer
        return layer

    # ---- initial values ----

    def set_factors(self, adapter_name: str, factors: Factors) -> None:
        """Sets an adapter's A and B such that `scaling B A` is the product of `factors`, truncated to the rank."""
        down, up = self.adapter_weights(adapter_name)
        if down.is_meta:
            return  # the values come from a file
        B, A = factors
        rank, root = len(down), math.sqrt(abs(self.scaling[adapter_name]))
        if rank < len(A):
            B, A = truncate_factors(B, A, rank)[:2]
        with torch.no_grad():
            up.zero_()
            up[:, : len(A)] = B / math.copysign(root, self.scaling[adapter_name])
            down[: len(A)] = A / root

    def adapter_weights(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Returns the trained A `(r, in)` and B `(out, r)` of an adapter."""
        down: Any = self.lora_A[adapter_name]
        up: Any = self.lora_B[adapter_name]
        return down.weight, up.weight

    def factors(self, adapter_name: str) -> Factors:
        """Returns B, multiplied by the scale, and A of an adapter, in float32 and without gradients."""
        A, B = self.adapter_weights(adapter_name)
        return B.detach().float() * self.scaling[adapter_name], A.detach().float()

    def residual_coefficient(self, names: Iterable[str]) -> float:
        """Returns the factor with which B₀A₀, the initial factors' product, is added to a sum of adapters.

        The base weight is Q + B₀A₀, and each adapter contains B₀A₀ once, or a multiple after `set_scale`. Their sum has
        to contain it once. 0 if the initial factors are not kept.
        """
        if not self.quantized.keep_init:
            return 0.0
        return 1 - sum(self.scaling[name] / self._configured_scaling(name) for name in names)

    def _configured_scaling(self, name: str) -> float:
        rank = self.r[name]
        return self.lora_alpha[name] / (math.sqrt(rank) if self.use_rslora.get(name, False) else rank)

    # ---- forward ----

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs as peft's layer; a few tokens at inference go through one operator for Q and the LoRA."""
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
        if names is not None:
            return self._add_residual_per_sample(result, x, names)
        return result if self.merged else self._add_residual(result, x, self.active_adapters)

    def _disabled(self, x: Tensor) -> Tensor:
        """Applies the layer without adapters: Q plus the initial factors, or Q if `quantized_only` is set."""
        if self.quantized_only:
            return self.quantized(x)
        B, A = self._kept_factors()
        return self.quantized(x, A, B)

    def _kept_factors(self) -> Factors:
        """Returns the initial factors; raises a RuntimeError if they are not kept."""
        initial = self.quantized.initial
        if initial is None:
            raise RuntimeError(f"A quantized layer has no active adapter, and {WITHOUT_ADAPTER}")
        return initial

    def _add_residual_per_sample(self, result: Tensor, x: Tensor, names: list[str]) -> Tensor:
        """Adds B₀A₀ by sample in a mixed batch; samples with an adapter not in this layer get Q x + B₀A₀ x."""
        for name in dict.fromkeys(names):
            here = [index for index, other in enumerate(names) if other == name]
            if name in self.lora_A:
                result[here] = self._add_residual(result[here], x[here], [name])
            else:
                result[here] = self._disabled(x[here])
        return result

    def _add_residual(self, result: Tensor, x: Tensor, names: Iterable[str]) -> Tensor:
        """Adds B₀A₀ `residual_coefficient(names)` times to the output `result` of the layer for `x`."""
        coefficient = self.residual_coefficient(name for name in names if name in self.lora_A)
        initial = self.quantized.initial if coefficient else None
        if initial is None:
            return result
        B, A = initial
        return result + (coefficient * (x.to(A.dtype) @ A.mT @ B.mT)).to(result.dtype)

    def _only_adapter(self, x: Tensor) -> str | None:
        """Returns the active adapter if one operator can compute the layer: inference, few tokens, a plain LoRA."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if torch.is_grad_enabled() or self.training or len(active) != 1 or x.shape[:-1].numel() > FUSED_TOKENS:
            return None
        (name,) = active
        # Subclasses shard the weight (FSDP), hooks need the module's output, and accelerate's hook loads the weight.
        modules = self.lora_A[name], self.lora_B[name]
        plain = all(type(m) is nn.Linear and not m._forward_hooks and not hasattr(m, "_hf_hook") for m in modules)
        plain = plain and name not in self.lora_variant and not self.lora_bias[name]
        return name if plain and not self.residual_coefficient(active) else None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Returns False: a plain LoRA is for the unquantized base model, this one for Q; `export_lora` converts it."""
        return False

    # ---- merging ----

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replaces the base layer by a floating-point one with the adapters merged, in the dtype before quantization.

        With `safe_merge`, a weight that is not finite raises a ValueError and leaves the layer unchanged.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        quantized = self.quantized
        if self._unmerged and offload_hook(quantized) is None:  # moving or casting since then did not reach it
            live: Any = self.base_layer
            quantized.to(live.weight.device, live.weight.dtype)
        together = [*self.merged_adapters, *names]
        with loaded(quantized):
            weight, bias = self._merged_weight(together), self._merged_bias(together)
            layer = quantized.to_floating(weight)
        finite = torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())
        if safe_merge and not finite:
            raise ValueError(f"NaNs detected in the merged weights: retrain the broken adapter {names[-1]!r}.")
        if bias is not None:
            layer._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
        offload_as(layer, quantized)
        self._unmerged = [quantized]
        self.base_layer = layer
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restores the quantized layer, with the same bits."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        merged: Any = self.base_layer
        quantized = self._unmerged.pop()
        if offload_hook(quantized) is None:
            quantized.to(merged.weight.device, merged.weight.dtype)
        offload_as(quantized, merged)
        self.base_layer = quantized
        self.merged_adapters.clear()

    def _merged_weight(self, names: list[str]) -> Tensor:
        """Quantized weight plus the updates of these adapters, `(out, in)`."""
        pairs, initial = [self.factors(name) for name in names], self.quantized.initial
        coefficient = self.residual_coefficient(names)
        if coefficient and initial:
            pairs.append((coefficient * initial[0], initial[1]))
        B, A = zip(*pairs, strict=True)
        return self.quantized.merged_weight(torch.cat(B, 1), torch.cat(A))

    def _merged_bias(self, names: list[str]) -> Tensor | None:
        """Returns the bias plus the biases of adapters with `lora_bias`; None if no adapter has one."""
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
        """Returns the layer that replaces this one in the base model: merged, or Q + B₀A₀ if there is nothing to merge.

        With `quantized_only` it is Q where there is nothing to merge.
        """
        if self.merged and not merge:
            self.unmerge()
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not isinstance(self.base_layer, NFLinear):
            return self.base_layer
        quantized = self.quantized
        if self.quantized_only:
            return quantized
        return quantized.to_floating(quantized.merged_weight(*self._kept_factors()))

    def __repr__(self) -> str:
        return f"lq_{super().__repr__()}"
