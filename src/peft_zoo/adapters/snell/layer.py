"""The adapter layer of SNELL: a sparse update of a kernel matrix between two factors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from peft_zoo.adapters.base import BufferDict, FactorDict, LinearLayout, ZooLayer
from peft_zoo.adapters.snell.config import SnellConfig
from peft_zoo.kernels.base.kernel_spec import KernelSpec
from peft_zoo.kernels.planning.sparsity import kept_count
from peft_zoo.kernels.snell.linear import kernelized_linear
from peft_zoo.kernels.snell.weight import kernelized_weight
from peft_zoo.kernels.sparse.threshold import KEEP_ALL


class SnellLayer(ZooLayer):
    """A frozen base layer with kernelized sparse updates."""

    adapter_layer_names = ("zoo_snell_A", "zoo_snell_B", "zoo_snell_kernel_params")
    other_param_names = ("zoo_snell_num_kept",)
    zoo_snell_A: FactorDict
    zoo_snell_B: FactorDict
    zoo_snell_kernel_params: FactorDict
    zoo_snell_num_kept: BufferDict
    last_threshold: dict[tuple[str, torch.device], Tensor]
    configs: dict[str, SnellConfig]  # type: ignore[assignment]

    def init_adapter(self, name: str, config: SnellConfig) -> None:  # type: ignore[override]
        """Creates A (G, in, r/G) and B (G, out, r/G), uniform within ±1/√(features · r/G), and the kept count."""
        shape = (config.kernel_groups, -1, config.r // config.kernel_groups)
        for container, features in ((self.zoo_snell_A, self.in_features), (self.zoo_snell_B, self.out_features)):
            factor = torch.empty(shape[0], features, shape[2])
            if config.init_weights is False:
                nn.init.normal_(factor, std=5 / math.sqrt(shape[2]))  # kernel values of about 1 times the scale
            else:
                bound = 1 / math.sqrt(features * shape[2])
                nn.init.uniform_(factor, -bound, bound)
            if config.init_weights == "paired":
                factor[1::2] = factor[::2]
            container[name] = nn.Parameter(factor)
        if config.kernel == "mix_k":
            self.zoo_snell_kernel_params[name] = nn.Parameter(torch.tensor([1.0, 1.0, 0.0]))
        numel = self.in_features * self.out_features
        kept = numel if config.sparsify == "none" else kept_count(config.sparsity, numel)
        self.zoo_snell_num_kept[name] = torch.tensor(kept)
        # First guess of the next threshold search. It changes no result, so it is not saved.
        vars(self).setdefault("last_threshold", {})

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter and its last threshold."""
        super().delete_adapter(adapter_name)
        for key in [key for key in self.last_threshold if key[0] == adapter_name]:
            del self.last_threshold[key]

    def delta_weight(self, name: str) -> Tensor:
        """Returns ΔW (out, in) in fp32."""
        return kernelized_weight(*self._arguments(name), last=self._last(name)).t()

    def delta_output(self, name: str, x: Tensor) -> Tensor:
        """Returns x ΔWᵀ for `x` (..., in); saves only `x` for the backward pass if the base layer is linear."""
        if isinstance(self.layout, LinearLayout):
            return kernelized_linear(x, *self._arguments(name), last=self._last(name))
        return super().delta_output(name, x)

    def fused_output(self, name: str, x: Tensor) -> Tensor | None:
        """Returns x (W₀ + ΔW)ᵀ + bias for `x` (..., in); None if `forward_mode` is additive or the scale is not 1."""
        base: Any = self.base_layer
        additive = {"fused": False, "auto": base.weight.dtype.itemsize < 4}.get(self.configs[name].forward_mode, True)
        if additive or self.scaling[name] != 1.0:
            return None
        frozen = {"weight": self.layout.to_base(base.weight), "bias": base.bias}
        return kernelized_linear(x, *self._arguments(name), **frozen, last=self._last(name))

    def _arguments(self, name: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor, KernelSpec]:
        """Arguments of the SNELL operators for an adapter: A, B, kernel parameters, number of kept entries, spec."""
        A, B = self.factor("zoo_snell_A", name), self.factor("zoo_snell_B", name)
        params = self.factor("zoo_snell_kernel_params", name) if self.configs[name].kernel == "mix_k" else None
        return A, B, params, self.zoo_snell_num_kept.read(name), self.configs[name].spec

    def _last(self, name: str) -> Tensor | None:
        """Returns the last threshold of an adapter, or None while a graph is traced, which must not change a layer.

        There is one for each device, since the replicas of `nn.DataParallel` share the dictionary.
        """
        if torch.compiler.is_compiling():
            return None
        key = (name, self.zoo_snell_num_kept.read(name).device)
        last = self.last_threshold.get(key)
        if last is None:
            with torch.inference_mode(False):  # an inference tensor could not be changed later
                last = self.last_threshold[key] = torch.full((), KEEP_ALL, device=key[1])
        return last
