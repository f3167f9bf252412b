r"""SNELL and SNELLA: sparse high-rank updates computed from low-rank factors.

Two factors A (G, in, r/G) and B (G, out, r/G) give each weight a kernel value; only the largest are kept:

    K_ij = Σ_g c_g ‖A_g[i] − B_g[j]‖_p,   c_g = scale · (+1, −1, +1, …)                      (`piecewise_linear`)
    W_ij = K_ij + α · softmax_j(K_ij / γ) + β,   α, β, γ trained                              (`mix_k`)
    ΔW_ij = W_ij · |W_ij| · 1[|W_ij| > t],   t the largest magnitude dropped                 (`signed_square`)

SNELL keeps a fixed share 1 − `sparsity` of the weights of each matrix. SNELLA (`target_sparsity`) lowers the share
during training and divides it among the matrices by importance, as AdaLoRA does with ranks.

Papers: SNELL, arXiv:2411.01800, eq. 3–5; SNELLA, arXiv:2510.24037. Where paper and released code differ, the default
follows the code: `signed_square`, with the factor |W| held constant in the gradient. Eq. 5 itself is `product`.

Cost of an adapted matrix: r·(in + out) trainable parameters (+3 for `mix_k`), no in·out tensor kept for backward, and
6·T·in·out matrix-multiplication FLOPs a step fused with a plain fp32 layer, 10·T·in·out otherwise (LoRA: 4).

Use it for a high-rank update with the parameters and memory of a LoRA: small data, vision, new domains. Prefer LoRA
when the time of a step matters most, or to serve many adapters unmerged.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_zoo.adapters.base import ZooModel
from peft_zoo.adapters.base.schedule_watch import watch_schedule
from peft_zoo.adapters.snell.allocator import SnellAllocator, SnellCallback
from peft_zoo.adapters.snell.config import SnellConfig
from peft_zoo.adapters.snell.layer import SnellLayer
from peft_zoo.registration import register


@register(
    SnellConfig,
    summary="Sparse high-rank update from low-rank factors; SNELLA divides kept weights among layers by importance.",
    parameters="r·(in + out)",
    memory="4·T·in (the input alone)",
    flops="6·T·in·out fused, 10·T·in·out additive",
    paper="arXiv:2411.01800, arXiv:2510.24037",
    callback=SnellCallback,
)
class SnellModel(ZooModel):
    """Tuner of SNELL and SNELLA, made by `get_peft_model(model, SnellConfig(...))`.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_zoo import SnellConfig
        >>> config = SnellConfig(r=4, sparsity=0.5, target_sparsity=0.9, total_step=2, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(10, 10)), config)
        >>> model(torch.randn(3, 10)).square().sum().backward()
        >>> model.base_model.update_and_allocate(1)  # after each optimizer.step(), before zero_grad()
        True
    """

    prefix = "zoo_snell_"
    tuner_layer_cls = SnellLayer
    _allocator: SnellAllocator | None = None

    def update_and_allocate(self, global_step: int) -> bool:
        """Runs SNELLA's allocation in a custom training loop; call it between `optimizer.step()` and `zero_grad()`.

        `SnellCallback` does this in `transformers.Trainer`. Without a `target_sparsity` nothing happens.

        Args:
            global_step: Number of optimizer steps completed, including this one.

        Returns:
            Whether the numbers of kept weights were allocated again.
        """
        scheduled = self._scheduled()
        if not scheduled:
            return False
        if self._allocator is None or self._allocator.adapter_name != scheduled[0]:
            self._allocator = SnellAllocator(self.model, scheduled[0])
        return self._allocator.step(global_step)

    def _finish_injection(self, model: nn.Module, adapter_name: str) -> None:
        super()._finish_injection(model, adapter_name)
        layers = [layer for layer in self._zoo_layers() if adapter_name in layer.scaling]
        if adapter_name in self._scheduled() and layers:
            watch_schedule(
                layers[0],
                adapter_name,
                lambda layer: layer.parameter("zoo_snell_A", adapter_name),
                f"target_sparsity of adapter {adapter_name!r} has no effect: nobody allocates its budget. Give Trainer "
                "`callbacks=[SnellCallback(model)]`, or call `update_and_allocate` after each optimizer step.",
            )

    def _scheduled(self) -> list[str]:
        """Names of the trainable adapters whose sparsity follows a schedule."""
        ours = ((name, c) for name, c in self.peft_config.items() if isinstance(c, SnellConfig))
        return [name for name, c in ours if c.target_sparsity is not None and not c.inference_mode]

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        config.require(
            config.target_sparsity is None or config.inference_mode or config.total_step is not None,
            "total_step",
            "target_sparsity needs the number of optimizer steps of the whole training",
        )
        scheduled = self._scheduled()
        if len(scheduled) > 1:
            raise ValueError(
                f"target_sparsity: adapters {scheduled} would compete for two budgets at once; only one trainable "
                "adapter may have `target_sparsity`. Set `inference_mode=True` on the others."
            )
