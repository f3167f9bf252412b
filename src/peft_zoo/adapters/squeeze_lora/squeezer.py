"""Lowers the rank of a LoRA in a training loop by a schedule, and balances its factors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from peft_zoo.adapters.base.schedule_watch import schedule_runs
from peft_zoo.adapters.squeeze_lora.factors import LoraPair, Projection, lora_pairs, squeeze_pair
from peft_zoo.adapters.squeeze_lora.finalize import config_table, finalize_squeeze, write_ranks
from peft_zoo.adapters.squeeze_lora.schedule import SqueezeConfig
from peft_zoo.kernels.low_rank.factored import factored_svd
from peft_zoo.kernels.planning.ranks import Spectrum, parse_budget, plan_ranks

logger = logging.getLogger("peft_zoo")


class LoraSqueezer:
    """Squeezes one adapter after the optimizer steps of its schedule; call `step` in the training loop.

    In mask mode parameters keep identity and shape, so DDP, torch.compile and learning rate schedules are unaffected,
    and a resumed run reads the ranks from the weights. With several processes the result of the first is broadcast,
    since singular vectors differ in their last bits between machines.

    Args:
        model: A `PeftModel`, or any model with LoRA layers, possibly inside `DistributedDataParallel`.
        total_steps: Optimizer steps of the whole run.
        config: The schedule; None uses the adapter's `SqueezeLoraConfig`.
        adapter_name: Name of the adapter; others are not changed.
        start: Rank (or size in the unit of the budget) at which the schedule starts; None measures the adapter. A run
            resumed in shrink mode passes the value of the first run.

    Attributes:
        stages: New rank (or size) by the optimizer step after which it applies; 0 for an energy.
        start: Rank or size at which the schedule starts.

    Raises:
        ValueError: If the schedule does not fit the adapter, the number of steps or the kind of training.
        NotImplementedError: If a module's update is not `s * B A`.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_zoo import SqueezeLoraConfig
        >>> from peft_zoo.squeeze_lora import LoraSqueezer
        >>> config = SqueezeLoraConfig(r=8, target_rank=2, num_stages=2, min_stage_steps=1, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config)
        >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        >>> squeezer = LoraSqueezer(model, total_steps=8)
        >>> squeezer.stages
        {3: 4, 6: 2}
        >>> for step in range(1, 9):
        ...     model(torch.ones(1, 16)).sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     _ = squeezer.step(step, optimizer)
        >>> squeezer.finalize()
        {'0': 2}
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        config: SqueezeConfig | None = None,
        adapter_name: str = "default",
        start: int | None = None,
    ) -> None:
        self.pairs = lora_pairs(model, adapter_name)
        layers: list[Any] = [pair.layer for pair in self.pairs]
        for layer in layers:
            schedule_runs(layer, adapter_name)
        found = config_table(model, adapter_name)[adapter_name]
        found = config or found
        if not isinstance(found, SqueezeConfig):
            raise ValueError(
                f"config=None, but adapter {adapter_name!r} has a {type(found).__name__} without a schedule: give a "
                "SqueezeConfig, or make the adapter with a SqueezeLoraConfig."
            )
        self.model, self.config, self.adapter_name = model, found, adapter_name
        if found.mode == "shrink" and _processes() > 1:
            raise ValueError("shrink mode is not supported with FSDP/DeepSpeed/DDP; use mode='mask'.")
        self.start = self._measure() if start is None else start
        self.stages = found.stages(self.start, total_steps) if found.has_target else {}
        self._warned = False

    @property
    def ranks(self) -> dict[str, int]:
        """Present rank of each module by name."""
        return {pair.name: pair.rank for pair in self.pairs}

    def step(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Squeezes if the schedule has a stage at this step; call it after `optimizer.step()` and `zero_grad()`.

        Args:
            step: Number of the optimizer step just taken, from 1.
            optimizer: Optimizer whose state is adapted to the new factors; None if there is none.

        Returns:
            Whether the adapter was squeezed.
        """
        if step not in self.stages:
            return False
        self.squeeze(self.stages[step], optimizer)
        return True

    def squeeze(self, value: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Squeezes the adapter now.

        Args:
            value: New rank, or new size in the unit of the budget; ignored for an energy.
            optimizer: Optimizer whose state is adapted to the new factors; None if there is none.
        """
        shrink = self.config.mode == "shrink"
        ranks = self._plan(value)
        projection = None if optimizer is None else Projection(optimizer, self.config.optimizer_state)
        fold = shrink and (self.config.scaling == "fold" or (self.config.scaling == "auto" and len(set(ranks)) > 1))
        for pair, rank in zip(self.pairs, ranks, strict=True):
            squeeze_pair(pair, rank, shrink=shrink, new_scale=1.0 if fold else None, optimizer=projection)
        if shrink:
            for pair in self.pairs if fold else ():
                pair.layer.use_rslora[self.adapter_name] = False
            write_ranks(self.model, self.adapter_name, self.pairs)
        _agree(self.pairs, optimizer)
        self._warn(projection)
        logger.info("Squeezed %d modules to ranks %d to %d.", len(ranks), min(ranks), max(ranks))

    def finalize(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
        """Squeezes to the target if it is not reached yet, then makes the adapter a plain LoRA (`finalize_squeeze`).

        Args:
            optimizer: Optimizer; its state of the factors is deleted, since their shapes change.

        Returns:
            Rank of each module by name.
        """
        if self.stages and not self._reached():
            self.squeeze(list(self.stages.values())[-1], optimizer)
        if optimizer is not None:
            for pair in self.pairs:
                for parameter in (pair.A, pair.B):
                    Projection(optimizer, "reset").optimizer.state.pop(parameter, None)
        return finalize_squeeze(self.model, self.adapter_name, self.config.scaling)

    def _plan(self, value: int) -> list[int]:
        """New rank of every pair, equal in all processes."""
        config = self.config
        if config.target_rank is not None:
            target = config.target(rank=value)
        elif config.budget is not None:
            target = config.target(budget=f"{value}B" if parse_budget(config.budget)[1] == "bytes" else value)
        else:
            target = config.target()
        spectra = {}
        for pair in self.pairs:
            B, A = pair.matrices()
            values = factored_svd(B, A, scale=pair.scale).singular_values.cpu()
            spectra[pair.name] = Spectrum(values, max(pair.rank, 1), pair.parameters, pair.B.element_size())
        ranks = [list(plan_ranks(spectra, target).values())]
        if _processes() > 1:
            dist.broadcast_object_list(ranks, src=0)
        return ranks[0]

    def _reached(self) -> bool:
        """Whether the target is reached; for an energy, whether the adapter was squeezed at all."""
        size = self._measure()
        return size < self.start if self.config.energy is not None else size <= list(self.stages.values())[-1]

    def _measure(self) -> int:
        """Largest rank, or the size of all factors in the unit of the budget."""
        if self.config.budget is None:
            return max(pair.rank for pair in self.pairs)
        in_bytes = parse_budget(self.config.budget)[1] == "bytes"
        return sum(pair.rank * pair.parameters * (pair.B.element_size() if in_bytes else 1) for pair in self.pairs)

    def _warn(self, projection: Projection | None) -> None:
        """Warns once if the optimizer's state could not be mapped."""
        if projection is not None and projection.was_reset and not self._warned:
            self._warned = True
            warnings.warn(
                f"The state of {type(projection.optimizer).__name__} cannot be mapped to new factors, so each squeeze "
                "resets it. Use torch's Adam or AdamW to keep it, or optimizer_state='reset' to silence this.",
                stacklevel=3,
            )


def refactorize_(
    model: nn.Module,
    adapter_name: str = "default",
    optimizer: torch.optim.Optimizer | None = None,
    optimizer_state: str = "project",
) -> None:
    """Balances the factors of an adapter in place: same update and rank, `B^T B = A A^T` diagonal.

    Factors of unequal size learn at unequal speeds; balanced factors have equal singular values.

    Args:
        model: A `PeftModel`, or any model with LoRA layers.
        adapter_name: Name of the adapter.
        optimizer: Optimizer whose state is adapted; None if there is none.
        optimizer_state: `"project"` (default) maps Adam's moments, `"reset"` deletes them.

    Raises:
        ValueError: If the adapter is missing, merged or sharded, or `optimizer_state` is unknown.
        NotImplementedError: If a module's update is not `s * B A`.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_zoo.squeeze_lora import refactorize_
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        >>> refactorize_(model)
        >>> B, A = (model.get_submodule(f"base_model.model.0.lora_{name}.default").weight for name in "BA")
        >>> torch.allclose(B.T @ B, A @ A.T, atol=1e-5)
        True
    """
    SqueezeConfig(optimizer_state=optimizer_state)  # validates it
    pairs = lora_pairs(model, adapter_name)
    projection = None if optimizer is None else Projection(optimizer, optimizer_state)
    for pair in pairs:
        squeeze_pair(pair, max(pair.rank, 1), shrink=False, optimizer=projection)
    _agree(pairs, optimizer)


def _agree(pairs: Sequence[LoraPair], optimizer: torch.optim.Optimizer | None) -> None:
    """Broadcasts factors and optimizer moments of the first process, so that all are equal to the last bit."""
    if _processes() == 1:
        return
    state = {} if optimizer is None else Projection(optimizer, "project").optimizer.state
    for pair in pairs:
        for parameter in (pair.B, pair.A):
            dist.broadcast(parameter.data, src=0)
            for moment in state.get(parameter, {}).values():
                if isinstance(moment, torch.Tensor) and moment.shape == parameter.shape:
                    dist.broadcast(moment, src=0)


def _processes() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
