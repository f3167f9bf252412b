"""SNELLA's budget during training: which matrix keeps how many weights, from step to step.

The mathematics is in `kernels.budget`; the layers and the configuration are in `snell`.
Source: SNELLA (arXiv 2510.24037) with its released code.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_zoo.adapters.base import StepCallback
from peft_zoo.kernels.planning.sparsity import ImportanceTracker, budget_at, kept_count, water_fill

__all__ = ["SnellAllocator", "SnellCallback"]


class SnellAllocator:
    """SNELLA's budget: counts what each matrix contributes and gives the kept weights to those that matter.

    Works on any model with SNELL layers, also when they were injected without a `PeftModel`. Processes agree on every
    allocation, however the parameters are sharded.

    Args:
        model: Model with the adapter.
        adapter_name: The adapter; its configuration must have `target_sparsity`.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.adapter_name = adapter_name
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        layers: Any = ((n, m) for n, m in model.named_modules() if hasattr(m, "zoo_snell_num_kept"))
        self.layers = {name: layer for name, layer in layers if adapter_name in layer.scaling}
        if not self.layers:
            raise ValueError(f"adapter_name={adapter_name!r}: the model has no SNELL layer with this adapter")
        self.config = next(iter(self.layers.values())).configs[adapter_name]
        self.caps = torch.tensor([layer.in_features * layer.out_features for layer in self.layers.values()])
        self.initial = sum(int(layer.zoo_snell_num_kept[adapter_name]) for layer in self.layers.values())

    @cached_property
    def tracker(self) -> ImportanceTracker:
        """The averages; made at the first step, as FSDP replaces the parameters before."""
        names = ("zoo_snell_A", "zoo_snell_B")
        factors = {key: [layer.parameter(n, self.adapter_name) for n in names] for key, layer in self.layers.items()}
        return ImportanceTracker(factors, self.config.beta1, self.config.beta2, self.config.importance)

    def step(self, global_step: int) -> bool:
        """Take in the gradients of optimizer step `global_step` (1-based, still in `.grad`) and allocate if it is due.

        Returns:
            Whether the budget was allocated anew. Never in the last `tfinal` steps, so the final pattern is trained.
        """
        config = self.config
        if config.target_sparsity is None or global_step >= (config.total_step or 0) - config.tfinal:
            return False
        self.tracker.update()
        target = sum(kept_count(config.target_sparsity, int(cap)) for cap in self.caps)
        kept, due = budget_at(
            global_step, self.initial, target, config.tinit, config.tfinal, config.total_step or 0, config.deltaT
        )
        if due:
            allocation = water_fill(self.tracker.scores(), self.caps, kept)
            for layer, count in zip(self.layers.values(), allocation.tolist(), strict=True):
                layer.zoo_snell_num_kept[self.adapter_name].fill_(count)
        return due

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, and the budget of the start."""
        return {"initial": torch.tensor(self.initial), **self.tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the averages and the budget of the start."""
        self.initial = int(state["initial"])
        self.tracker.load_state_dict({key: value for key, value in state.items() if key != "initial"})


class SnellCallback(StepCallback):
    """Runs SNELLA's allocation inside `transformers.Trainer`, and keeps its state in the checkpoints.

    Args:
        model: The model that is trained, with one trainable adapter that has `target_sparsity`.
        adapter_name: The adapter; by default the active one.
    """

    file_name = "snell_allocator.safetensors"

    def __init__(self, model: nn.Module, adapter_name: str | None = None) -> None:
        active = getattr(model, "active_adapter", "default")
        super().__init__(SnellAllocator(model, adapter_name or (active if isinstance(active, str) else "default")))
