"""SNELLA's allocation during training: sets the number of non-zero weights of each matrix step by step.

`kernels.planning.sparsity` has the mathematics. Source: SNELLA (arXiv:2510.24037) and its released code.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_zoo.adapters.base import StepCallback
from peft_zoo.adapters.base.schedule_watch import schedule_runs
from peft_zoo.kernels.planning.sparsity import ImportanceTracker, budget_at, kept_count, water_fill


class SnellAllocator:
    """Divides SNELLA's budget of kept weights among the matrices by their importance.

    Works on any model with SNELL layers, also without a `PeftModel` (`inject_adapter_in_model`); with one, use
    `SnellModel.update_and_allocate` or `SnellCallback`. All processes compute the same allocation, also with sharded
    parameters.

    Args:
        model: Model with the adapter.
        adapter_name: Name of the adapter; its configuration has `target_sparsity` and `total_step`.

    Raises:
        ValueError: If no SNELL layer has the adapter.

    Examples:
        >>> import torch
        >>> from peft import inject_adapter_in_model
        >>> from peft_zoo import SnellConfig
        >>> config = SnellConfig(r=4, sparsity=0.5, target_sparsity=0.9, total_step=2, target_modules=["0"])
        >>> model = inject_adapter_in_model(config, torch.nn.Sequential(torch.nn.Linear(10, 10)))
        >>> allocator = SnellAllocator(model, "default")
        >>> model(torch.randn(3, 10)).square().sum().backward()
        >>> allocator.step(1)  # after each optimizer.step(), before zero_grad()
        True
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.adapter_name = adapter_name
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        layers: Any = ((n, m) for n, m in model.named_modules() if hasattr(m, "zoo_snell_num_kept"))
        self.layers = {name: layer for name, layer in layers if adapter_name in layer.scaling}
        if not self.layers:
            raise ValueError(f"adapter_name={adapter_name!r}: no SNELL layer has it; use another name")
        self.config = next(iter(self.layers.values())).configs[adapter_name]
        self.caps = torch.tensor([layer.in_features * layer.out_features for layer in self.layers.values()])
        self.initial = self.kept()

    @cached_property
    def tracker(self) -> ImportanceTracker:
        """Moving averages of the importance; made at the first step, after FSDP has replaced the parameters."""
        names = ("zoo_snell_A", "zoo_snell_B")
        factors = {key: [layer.parameter(n, self.adapter_name) for n in names] for key, layer in self.layers.items()}
        return ImportanceTracker(factors, self.config.beta1, self.config.beta2, self.config.importance)

    def step(self, global_step: int) -> bool:
        """Updates the importance from the gradients of an optimizer step and allocates if an allocation is due.

        Args:
            global_step: Number of optimizer steps completed, including this one; its gradients are still in `.grad`.

        Returns:
            Whether the numbers of kept weights were allocated again. False in the last `tfinal` steps, so that the
            final pattern is trained.
        """
        for layer in self.layers.values():
            schedule_runs(layer, self.adapter_name)
        config = self.config
        if config.target_sparsity is None or global_step >= (config.total_step or 0) - config.tfinal:
            return False
        self.tracker.update()
        kept, due = budget_at(
            global_step, self.initial, self.target(), config.tinit, config.tfinal, config.total_step or 0, config.deltaT
        )
        if due:
            allocation = water_fill(self.tracker.scores(), self.caps, kept)
            for layer, count in zip(self.layers.values(), allocation.tolist(), strict=True):
                layer.zoo_snell_num_kept[self.adapter_name].fill_(count)
        return due

    def target(self) -> int:
        """Returns the number of weights that all layers keep at the end of the schedule."""
        return sum(kept_count(self.config.target_sparsity or 0.0, int(cap)) for cap in self.caps)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the moving averages and the initial budget."""
        return {"initial": torch.tensor(self.initial), **self.tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned; raises a ValueError that names the field if it does not fit."""
        initial, most = state.get("initial"), int(self.caps.sum())
        if initial is None or initial.dtype != torch.int64 or initial.dim() or not 0 <= int(initial) <= most:
            shown = None if initial is None else initial.flatten()[:1].tolist()
            raise ValueError(f"state: initial={shown} is not a number of kept weights, from 0 to {most} as one int64.")
        self.tracker.load_state_dict({key: value for key, value in state.items() if key != "initial"})
        self.initial = int(initial)

    def kept(self) -> int:
        """Returns the number of weights that all layers keep now."""
        return sum(int(layer.zoo_snell_num_kept.read(self.adapter_name)) for layer in self.layers.values())


class SnellCallback(StepCallback):
    """Runs SNELLA's allocation in `transformers.Trainer` and saves its state in each checkpoint.

    Args:
        model: Model to train, with one trainable adapter that has `target_sparsity`.
        adapter_name: Name of the adapter; default: the active one.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_zoo import SnellConfig
        >>> config = SnellConfig(r=4, target_sparsity=0.95, total_step=100, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(10, 10)), config)
        >>> callback = SnellCallback(model)  # Trainer(model, ..., callbacks=[callback])
        >>> callback.stepper.adapter_name
        'default'
    """

    file_name = "snell_allocator.safetensors"
    stepper: SnellAllocator

    def __init__(self, model: nn.Module, adapter_name: str | None = None) -> None:
        active = getattr(model, "active_adapter", "default")
        super().__init__(SnellAllocator(model, adapter_name or (active if isinstance(active, str) else "default")))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warns if the best checkpoint, which `load_best_model_at_end` has loaded, has not the target's budget."""
        config, kept = self.stepper.config, self.stepper.kept()
        is_over = state.global_step >= (config.total_step or 0) - config.tfinal
        if config.target_sparsity is not None and is_over and args.load_best_model_at_end:
            target = self.stepper.target()
            if kept != target:
                warnings.warn(
                    f"load_best_model_at_end: the adapter of {state.best_model_checkpoint} keeps {kept} weights, the "
                    f"budget of its step, and not the {target} of target_sparsity={config.target_sparsity}. Load the "
                    "last checkpoint, or evaluate only after the budget has reached its target.",
                    stacklevel=2,
                )
