r"""SNELL and SNELLA: a sparse update of high rank from low-rank factors, where weights compete for a budget.

Two factor tensors A (G, in, r/G) and B (G, out, r/G) give every weight a kernel value; only the largest survive:

    K_ij = Σ_g c_g ‖A_g[i] − B_g[j]‖_p,   c_g = scale · (+1, −1, +1, …)                      (`piecewise_linear`)
    W_ij = K_ij + α · softmax_j(K_ij / γ) + β,   α, β, γ trained                              (`mix_k`)
    ΔW_ij = W_ij · |W_ij| · 1[|W_ij| > t],   t the smallest magnitude dropped                 (`signed_square`)

SNELL keeps a fixed share 1 − `sparsity` of the weights of each matrix. SNELLA (`target_sparsity`) lowers the share
during training and lets the matrices compete for it by importance, as AdaLoRA lets ranks compete.

Papers: SNELL, arXiv:2411.01800, eq. 3–5; SNELLA, arXiv:2510.24037. Where paper and released code differ, the default
follows the code: `signed_square`, with the factor |W| held constant in the gradient. Eq. 5 itself is `product`.

Cost of an adapted matrix: r·(in + out) trainable parameters (+3 for `mix_k`), no in·out tensor kept for backward, and
6·T·in·out matrix-multiplication FLOPs a step fused with a plain fp32 layer, 10·T·in·out otherwise (LoRA: 4).

Use it for an update of high rank at a LoRA's price in parameters and memory: small data, vision, new domains.
Prefer LoRA when step time counts most, or when many adapters are to be served unmerged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from peft_zoo.adapters.base import FactorDict, LinearLayout, ZooConfig, ZooLayer, ZooModel, option
from peft_zoo.adapters.snell.allocator import SnellAllocator, SnellCallback
from peft_zoo.kernels.base.kernel_spec import KERNELS, SPARSIFY, KernelSpec
from peft_zoo.kernels.planning.sparsity import kept_count
from peft_zoo.kernels.snell.linear import kernelized_linear
from peft_zoo.kernels.snell.weight import kernelized_weight
from peft_zoo.kernels.sparse.threshold import KEEP_ALL
from peft_zoo.registration import register

__all__ = ["SnellConfig", "SnellModel"]


@dataclass
class SnellConfig(ZooConfig):
    """Configuration of SNELL, and with `target_sparsity` of SNELLA."""

    method_name: ClassVar[str] = "snell"
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "sparsity_pattern": "sparsity"}
    # Elsewhere a zero update would have a zero gradient: it could never leave the start.
    identity: ClassVar[dict[str, Any]] = {"sparsify": "none", "init_weights": "paired"}
    suggested_learning_rate: ClassVar[float | None] = 0.03

    kernel: str = option("piecewise_linear", f"How a weight comes from its factors: {', '.join(KERNELS)}.")
    kernel_groups: int = option(2, "Number of groups G; must divide r.")
    kernel_norm: int = option(2, "p of the distance, 1 or 2; only piecewise_linear takes 1.")
    kernel_scale: float = option(0.1, "Magnitude of the groups' coefficients c_g.")
    sparsity: float = option(0.9, "Share of zeros in each matrix's update, in [0, 1); SNELLA starts there.")
    sparsity_pattern: dict[str, float] = option(dict, "Sparsity for modules whose name matches the key.")
    sparsify: str = option(
        "signed_square", f"What becomes of the kept weights: {', '.join(SPARSIFY)} (none keeps all)."
    )
    snell_dropout: float = option(0.0, "Dropout of the update's input; the authors use 0.1.")
    snell_drop_path: float = option(0.0, "Probability of dropping a sample's update; the authors use 0.1.")
    forward_mode: str = option(
        "auto",
        "fused: one product with the sum of both weights; additive: the update is added to the frozen layer's output; "
        "auto: fused for plain fp32 layers without dropout (16-bit weights would lose most of a small update).",
    )
    target_sparsity: float | None = option(None, "SNELLA's final share of zeros over all matrices; None: plain SNELL.")
    tinit: int = option(0, "Optimizer steps before the budget shrinks.")
    tfinal: int = option(
        0, "Optimizer steps at the end with a frozen budget; about 10 % of total_step is a good start."
    )
    deltaT: int = option(1, "Optimizer steps between two allocations.")
    total_step: int | None = option(None, "Optimizer steps in all; needed with target_sparsity.")
    beta1: float = option(0.85, "Decay of the average of the importance.")
    beta2: float = option(0.85, "Decay of the average of its uncertainty.")
    importance: str = option(
        "sensitivity", "What makes a factor important: sensitivity (|T · grad|) or magnitude (|T|)."
    )

    def check(self) -> None:
        """Raise a ValueError for the first of the method's fields that cannot work."""
        for name, allowed in (
            ("kernel", KERNELS),
            ("kernel_norm", (1, 2)),
            ("sparsify", SPARSIFY),
            ("forward_mode", ("auto", "fused", "additive")),
            ("importance", ("sensitivity", "magnitude")),
            ("init_weights", (True, False, "paired")),
        ):
            self.require(getattr(self, name) in allowed, name, f"use one of {', '.join(map(repr, allowed))}")
        groups = self.kernel_groups
        self.require(isinstance(groups, int) and groups > 0, "kernel_groups", "use an integer of at least 1")
        self.require(self.r % groups == 0, "r", f"use a multiple of kernel_groups={groups}")
        plain = self.kernel == "piecewise_linear"
        self.require(self.kernel_norm == 2 or plain, "kernel_norm", f"use 2 with kernel={self.kernel!r}")
        self.require(0 < self.kernel_scale < math.inf, "kernel_scale", "use a positive, finite number")
        self.require(0 <= self.sparsity < 1, "sparsity", "use a share of zeros in [0, 1)")
        for name in ("snell_dropout", "snell_drop_path", "beta1", "beta2"):
            self.require(0 <= getattr(self, name) < 1, name, "use a number in [0, 1)")
        fusable = not (self.snell_dropout or self.snell_drop_path)
        self.require(self.forward_mode != "fused" or fusable, "forward_mode", "use 'additive' or 'auto' with a dropout")
        paired = self.sparsify == "none" and plain and groups % 2 == 0
        fix = "'paired' needs sparsify='none', kernel='piecewise_linear', an even kernel_groups: else it never trains"
        self.require(self.init_weights != "paired" or paired, "init_weights", fix)
        if self.target_sparsity is not None:
            self._check_schedule()

    def _check_schedule(self) -> None:
        self.require(0 <= (self.target_sparsity or 0) < 1, "target_sparsity", "use a share of zeros in [0, 1)")
        self.require(self.sparsify != "none", "sparsify", "target_sparsity needs a mode that drops weights")
        self.require(self.deltaT >= 1, "deltaT", "use an integer of at least 1")
        self.require(self.tfinal >= 0, "tfinal", "use a number of steps of at least 0")
        total = self.total_step or 0
        self.require(total > 0, "total_step", "set the number of optimizer steps of the whole training")
        free = total - self.tfinal
        self.require(0 <= self.tinit < free, "tinit", f"use less than total_step - tfinal = {free}")

    @property
    def spec(self) -> KernelSpec:
        """What the kernels need to know."""
        return KernelSpec(self.kernel, self.kernel_norm, self.kernel_scale, self.sparsify)


class SnellLayer(ZooLayer):
    """A frozen layer with kernelized sparse updates."""

    adapter_layer_names = ("zoo_snell_A", "zoo_snell_B", "zoo_snell_kernel_params")
    other_param_names = ("zoo_snell_num_kept",)
    zoo_snell_A: FactorDict
    zoo_snell_B: FactorDict
    zoo_snell_kernel_params: FactorDict
    zoo_snell_num_kept: BufferDict
    last_threshold: dict[tuple[str, torch.device], Tensor]
    configs: dict[str, SnellConfig]  # type: ignore[assignment]

    def init_adapter(self, name: str, config: SnellConfig) -> None:  # type: ignore[override]
        """A (G, in, r/G) and B (G, out, r/G), uniform within 1/√(features · r/G), and the number of kept weights."""
        shape = (config.kernel_groups, -1, config.r // config.kernel_groups)
        for container, features in ((self.zoo_snell_A, self.in_features), (self.zoo_snell_B, self.out_features)):
            factor = torch.empty(shape[0], features, shape[2])
            if config.init_weights is False:
                nn.init.normal_(factor, std=5 / math.sqrt(shape[2]))  # kernel values of about 1 after the small scale
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
        # Where the next selection looks first. It changes no result, so it is neither a buffer nor saved.
        vars(self).setdefault("last_threshold", {})

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and what is remembered of it."""
        super().delete_adapter(adapter_name)
        for key in [key for key in self.last_threshold if key[0] == adapter_name]:
            del self.last_threshold[key]

    def delta_weight(self, name: str) -> Tensor:
        """ΔW (out, in) in fp32."""
        return kernelized_weight(*self._arguments(name), last=self._last(name)).t()

    def delta_output(self, name: str, x: Tensor) -> Tensor:
        """`x` (..., in) to (..., out) without keeping ΔW; other layers than linear ones form it."""
        if isinstance(self.layout, LinearLayout):
            return kernelized_linear(x, *self._arguments(name), last=self._last(name))
        return super().delta_output(name, x)

    def fused_output(self, name: str, x: Tensor) -> Tensor | None:
        """`x` (..., in) to (..., out) by one product with W₀ + ΔW."""
        base: Any = self.base_layer
        additive = {"fused": False, "auto": base.weight.dtype.itemsize < 4}.get(self.configs[name].forward_mode, True)
        if additive or self.scaling[name] != 1.0:
            return None
        frozen = {"weight": self.layout.to_base(base.weight), "bias": base.bias}
        return kernelized_linear(x, *self._arguments(name), **frozen, last=self._last(name))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: the update has high rank by design."""
        return False

    def _arguments(self, name: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor, KernelSpec]:
        A, B = self.factor("zoo_snell_A", name), self.factor("zoo_snell_B", name)
        params = self.factor("zoo_snell_kernel_params", name) if self.configs[name].kernel == "mix_k" else None
        return A, B, params, self.zoo_snell_num_kept[name], self.configs[name].spec

    def _last(self, name: str) -> Tensor | None:
        """`last_threshold` on the device of the adapter; None while a graph is traced, which must not change a layer.

        By device, since the replicas of `nn.DataParallel` share the dictionary.
        """
        if torch.compiler.is_compiling():
            return None
        key = (name, self.zoo_snell_num_kept[name].device)
        last = self.last_threshold.get(key)
        if last is None:
            with torch.inference_mode(False):  # else it could not be changed outside of this mode
                last = self.last_threshold[key] = torch.full((), KEEP_ALL, device=key[1])
        return last


@register(
    SnellConfig,
    summary="Sparse update of high rank from low-rank factors; SNELLA lets layers compete for the kept weights.",
    parameters="r·(in + out)",
    memory="4·T·in (the input alone)",
    flops="6·T·in·out fused, 10·T·in·out additive",
    paper="arXiv:2411.01800, arXiv:2510.24037",
    callback=SnellCallback,
)
class SnellModel(ZooModel):
    """Tuner of SNELL and SNELLA; use `get_peft_model(model, SnellConfig(...))`."""

    prefix = "zoo_snell_"
    tuner_layer_cls = SnellLayer
    _allocator: SnellAllocator | None = None

    def update_and_allocate(self, global_step: int) -> bool:
        """SNELLA's step for training loops of your own: call it after `optimizer.step()` and before the gradients are
        cleared.

        Args:
            global_step: Optimizer steps completed, this one included.

        Returns:
            Whether the budget was allocated anew.
        """
        scheduled = self._scheduled()
        if not scheduled:
            return False
        if self._allocator is None or self._allocator.adapter_name != scheduled[0]:
            self._allocator = SnellAllocator(self.model, scheduled[0])
        return self._allocator.step(global_step)

    def _scheduled(self) -> list[str]:
        return [n for n, c in self.peft_config.items() if c.target_sparsity is not None and not c.inference_mode]

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        scheduled = self._scheduled()
        if len(scheduled) > 1:
            raise ValueError(
                f"target_sparsity: adapters {scheduled} would compete for two budgets at once; only one trainable "
                "adapter may have `target_sparsity`. Set `inference_mode=True` on the others."
            )
