"""The LoRA of LQ-LoRA, around a layer in NormalFloat.

It is merged into a copy in floating-point; the packed bits are set aside and come back when it is unmerged.
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

from peft_zoo.adapters.lq_lora.nf_linear import Factors, NFLinear
from peft_zoo.kernels.low_rank.factored import truncate_factors

FUSED_TOKENS = 32
"""Largest number of tokens for which base layer and LoRA are computed by one operator."""


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

    def lacking(self, names: Iterable[str]) -> float:
        """How often the factors that were split off are missing from the sum of the adapters of these names.

        Each of them has these factors, as often as it counts: once, or as `set_scale` and the like have it. The base
        model has them once. 0 where they are not kept.
        """
        if not self.quantized.keeps:
            return 0.0
        return 1 - sum(self.scaling[name] / self._own_scaling(name) for name in names)

    def _own_scaling(self, name: str) -> float:
        rank = self.r[name]
        return self.lora_alpha[name] / (math.sqrt(rank) if self.use_rslora.get(name, False) else rank)

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
        if names is not None:
            return self._rows_balanced(result, x, names)
        return result if self.merged else self._balanced(result, x, self.active_adapters)

    def _disabled(self, x: Tensor) -> Tensor:
        """The layer without adapters: Q and, where they are kept, the factors that were split off."""
        B, A = self.quantized.initial or (None, None)
        return self.quantized(x, A, B)

    def _rows_balanced(self, result: Tensor, x: Tensor, names: list[str]) -> Tensor:
        """A mixed batch, where each row has an adapter: one without an adapter here is as if all were disabled."""
        for name in dict.fromkeys(names):
            here = [index for index, other in enumerate(names) if other == name]
            if name in self.lora_A:
                result[here] = self._balanced(result[here], x[here], [name])
            else:
                result[here] = self._disabled(x[here])
        return result

    def _balanced(self, result: Tensor, x: Tensor, names: Iterable[str]) -> Tensor:
        """The sum of several adapters, or of a scaled one, with what was split off counted once."""
        lacking = self.lacking(name for name in names if name in self.lora_A)
        initial = self.quantized.initial if lacking else None
        if initial is None:
            return result
        B, A = initial
        return result + (lacking * (x.to(A.dtype) @ A.mT @ B.mT)).to(result.dtype)

    def _only_adapter(self, x: Tensor) -> str | None:
        """The one active adapter, if nothing is trained and few tokens are to go through one operator."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if torch.is_grad_enabled() or self.training or len(active) != 1 or x.shape[:-1].numel() > FUSED_TOKENS:
            return None
        (name,) = active
        # A subclass shards its weight (FSDP), a hook wants to see the product, accelerate's brings the weight.
        modules = self.lora_A[name], self.lora_B[name]
        plain = all(type(m) is nn.Linear and not m._forward_hooks and not hasattr(m, "_hf_hook") for m in modules)
        plain = plain and name not in self.lora_variant and not self.lora_bias[name]
        return name if plain and not self.lacking(active) else None

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
        if self._set_aside:  # the model may have been moved or cast since, which did not reach it
            live: Any = self.base_layer
            self._set_aside[0].to(live.weight.device, live.weight.dtype)
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
        self.base_layer = self._set_aside.pop().to(merged.weight.device, merged.weight.dtype)
        self.merged_adapters.clear()

    def _merged_weight(self, names: list[str]) -> Tensor:
        pairs, lacking, initial = [self.factors(name) for name in names], self.lacking(names), self.quantized.initial
        if lacking and initial:
            pairs.append((lacking * initial[0], initial[1]))
        B, A = zip(*pairs, strict=True)
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
        initial = quantized.initial
        return quantized if initial is None else quantized.floating(quantized.plus(*initial))

    def __repr__(self) -> str:
        return f"lq_{super().__repr__()}"
