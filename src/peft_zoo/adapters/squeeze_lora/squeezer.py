"""Lowers the rank of a LoRA in a training loop, step by step of a schedule; and balances factors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from peft_zoo.adapters.squeeze_lora.factors import LoraPair, Projection, lora_pairs, squeeze_pair
from peft_zoo.adapters.squeeze_lora.finalize import config_table, finalize_squeeze, write_ranks
from peft_zoo.adapters.squeeze_lora.schedule import SqueezeConfig
from peft_zoo.kernels.low_rank.factored import factored_svd
from peft_zoo.kernels.planning.ranks import Spectrum, parse_budget, plan_ranks

logger = logging.getLogger("peft_zoo")


class LoraSqueezer:
    """Squeezes one adapter after the optimizer steps that its schedule names.

    In mask mode parameters keep identity and shape: DDP, torch.compile and learning rate schedules need not know of
    it, and a run that resumes finds the ranks in the weights. With several processes the first
    decides and all take its bits, since singular vectors are not the same to the last bit everywhere.

    Args:
        model: A `PeftModel`, or any model with LoRA layers; DDP's wrapper may be around it.
        total_steps: Optimizer steps of the whole run.
        config: The schedule; None takes it from the adapter's `SqueezeLoraConfig`.
        adapter_name: The adapter; every other one is left alone.
        start: What the schedule starts from, a rank or a budget; None takes what the model has now. A run that resumes
            in shrink mode gives the rank that the first run started from.

    Attributes:
        stages: Steps after which the rank (or the budget) falls, and to what.
        start: As above.

    Raises:
        ValueError: If the schedule does not fit the adapter, the number of steps or the way of training.
        NotImplementedError: If a module's update is not a plain product of two factors.
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
        """Present rank of each module."""
        return {pair.name: pair.rank for pair in self.pairs}

    def step(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Squeezes if the schedule says so; call it after optimizer step `step`, its gradients cleared.

        Args:
            step: 1-based number of the optimizer step that was just taken.
            optimizer: Its state follows the factors.

        Returns:
            Whether anything was squeezed.
        """
        if step not in self.stages:
            return False
        self.squeeze(self.stages[step], optimizer)
        return True

    def squeeze(self, value: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Squeezes now, to a rank or a budget (an energy needs no value)."""
        shrink = self.config.mode == "shrink"
        ranks = self._plan(value)
        projection = None if optimizer is None else Projection(optimizer, self.config.optimizer_state)
        fold = shrink and (self.config.scaling == "fold" or (self.config.scaling == "auto" and len(set(ranks)) > 1))
        for pair, rank in zip(self.pairs, ranks, strict=True):
            squeeze_pair(pair, rank, shrink=shrink, new_scale=1.0 if fold else None, optimizer=projection)
        if shrink:
            self._shrunk(fold)
        _agree(self.pairs, optimizer)
        self._warn(projection)
        logger.info("Squeezed %d modules to ranks %d to %d.", len(ranks), min(ranks), max(ranks))

    def finalize(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
        """Reaches the target if it is not reached yet, then makes the adapter a plain LoRA (`finalize_squeeze`)."""
        if self.stages and not self._reached():
            self.squeeze(list(self.stages.values())[-1], optimizer)
        if optimizer is not None:  # its state has the old sizes
            for pair in self.pairs:
                for parameter in (pair.A, pair.B):
                    Projection(optimizer, "reset").optimizer.state.pop(parameter, None)
        return finalize_squeeze(self.model, self.adapter_name, self.config.scaling)

    def _plan(self, value: int) -> list[int]:
        """A rank for every pair, the same list in every process."""
        config = self.config
        if config.target_rank is not None:
            target = config.target(rank=value)
        else:
            target = config.target() if config.budget is None else config.target(budget=self._budget(value))
        spectra = {}
        for pair in self.pairs:
            B, A = pair.matrices()
            values = factored_svd(B, A, scale=pair.scale).singular_values.cpu()
            spectra[pair.name] = Spectrum(values, max(pair.rank, 1), pair.parameters, pair.B.element_size())
        ranks = [list(plan_ranks(spectra, target).values())]
        if _processes() > 1:
            dist.broadcast_object_list(ranks, src=0)
        return ranks[0]

    def _budget(self, value: int) -> int | str:
        unit = parse_budget(self.config.budget or 1)[1]
        return value if unit == "parameters" else f"{value}B"

    def _reached(self) -> bool:
        """Whether the target holds. An energy is reached once something was squeezed: it says nothing of the result."""
        size = self._measure()
        return size < self.start if self.config.energy is not None else size <= list(self.stages.values())[-1]

    def _measure(self) -> int:
        """The largest rank, or the size of all factors in the budget's unit."""
        if self.config.budget is None:
            return max(pair.rank for pair in self.pairs)
        in_bytes = parse_budget(self.config.budget)[1] == "bytes"
        return sum(pair.rank * pair.parameters * (pair.B.element_size() if in_bytes else 1) for pair in self.pairs)

    def _shrunk(self, fold: bool) -> None:
        if fold:
            for pair in self.pairs:
                pair.layer.use_rslora[self.adapter_name] = False
        write_ranks(config_table(self.model, self.adapter_name)[self.adapter_name], self.pairs)

    def _warn(self, projection: Projection | None) -> None:
        if projection is not None and projection.was_reset and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(projection.optimizer).__name__} keeps a state that cannot follow the factors; it starts anew "
                "for them after each squeeze. Use torch's Adam or AdamW to keep it, or optimizer_state='reset' to "
                "silence this.",
                stacklevel=3,
            )


def refactorize_(
    model: nn.Module,
    adapter_name: str = "default",
    optimizer: torch.optim.Optimizer | None = None,
    optimizer_state: str = "project",
) -> None:
    """Balances the factors of an adapter in place: same update and rank, `B^T B = A A^T` diagonal.

    Unequal factors learn at unequal speeds; after this both have the singular values' roots.

    Args:
        model: A `PeftModel`, or any model with LoRA layers.
        adapter_name: The adapter.
        optimizer: Its state follows the factors, or starts anew.
        optimizer_state: `"project"` or `"reset"`.

    Raises:
        ValueError: If there is no such adapter, it is merged, its tensors are sharded, or `optimizer_state` is unknown.
        NotImplementedError: If a module's update is not a plain product of two factors.
    """
    SqueezeConfig(optimizer_state=optimizer_state)  # checks it
    pairs = lora_pairs(model, adapter_name)
    projection = None if optimizer is None else Projection(optimizer, optimizer_state)
    for pair in pairs:
        squeeze_pair(pair, max(pair.rank, 1), shrink=False, optimizer=projection)
    _agree(pairs, optimizer)


def _agree(pairs: Sequence[LoraPair], optimizer: torch.optim.Optimizer | None) -> None:
    """Gives every process the bits of the first."""
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
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


__all__ = ["LoraSqueezer", "refactorize_"]
