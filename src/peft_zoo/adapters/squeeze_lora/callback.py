"""Callbacks for `transformers.Trainer` that lower the rank of a LoRA during training, or balance its factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from peft_zoo.adapters.squeeze_lora.finalize import resize_to
from peft_zoo.adapters.squeeze_lora.schedule import SqueezeConfig
from peft_zoo.adapters.squeeze_lora.squeezer import LoraSqueezer, refactorize_
from peft_zoo.common.checks import check_count


class SqueezeCallback(TrainerCallback, ExportableState):
    """Runs a `LoraSqueezer` in `transformers.Trainer` and makes the adapter a plain LoRA at the end of training.

    Args:
        config: The schedule, or a dict of its fields; None uses the adapter's `SqueezeLoraConfig`.
        adapter_name: Name of the adapter; others are not changed.
        start: Rank (or size) at which the schedule starts; None measures the adapter, or takes the value that a
            checkpoint has stored.

    Attributes:
        squeezer: Created when training begins; raises then if the schedule does not fit adapter or number of steps.

    Examples:
        >>> from peft_zoo.squeeze_lora import SqueezeCallback, SqueezeConfig
        >>> callback = SqueezeCallback(SqueezeConfig(target_rank=8, num_stages=3))  # Trainer(..., callbacks=[callback])
        >>> callback.state()["args"]["config"]["target_rank"]
        8
    """

    def __init__(
        self,
        config: SqueezeConfig | Mapping[str, Any] | None = None,
        adapter_name: str = "default",
        start: int | None = None,
    ) -> None:
        self.config = SqueezeConfig(**config) if isinstance(config, Mapping) else config
        self.adapter_name, self.start = adapter_name, start
        self.squeezer: LoraSqueezer | None = None
        self._last_squeeze: int | None = None  # optimizer step
        self._rates: list[float] | None = None  # learning rates of the scheduler while lower ones replace them

    def state(self) -> dict[str, Any]:
        """Arguments to store in a checkpoint."""
        config = self.config and {item.name: getattr(self.config, item.name) for item in fields(SqueezeConfig)}
        return {"args": {"config": config, "adapter_name": self.adapter_name, "start": self.start}, "attributes": {}}

    @staticmethod
    def prepare_resume(model: nn.Module, checkpoint: str | Path, adapter_name: str = "default") -> None:
        """Resizes a new model's factors to a checkpoint of shrink mode; call it before `trainer.train`.

        Not needed in mask mode, where sizes never change.

        Args:
            model: The `PeftModel`, created as for the first run.
            checkpoint: The `checkpoint-N` folder.
            adapter_name: Name of the adapter.

        Raises:
            ValueError: If the checkpoint has no such adapter, or a rank is larger than that in the model.
        """
        resize_to(model, Path(checkpoint), adapter_name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Creates the squeezer."""
        if state.global_step > 0 and self.start is None:
            saved = state.stateful_callbacks.get(type(self).__name__, {})
            saved = saved[0] if isinstance(saved, list) else saved
            self.start = saved.get("args", {}).get("start")
        self.squeezer = LoraSqueezer(kwargs["model"], state.max_steps, self.config, self.adapter_name, self.start)
        self.start = self.squeezer.start
        if self.squeezer.config.mode == "shrink" and args.load_best_model_at_end:
            raise ValueError("shrink mode is not supported with load_best_model_at_end=True; use mode='mask'.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Squeezes if the schedule has a stage at this step, before a checkpoint is written."""
        if self.squeezer is not None and self.squeezer.step(state.global_step, kwargs["optimizer"]):
            self._last_squeeze = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lowers the learning rate for `rewarmup_steps` after a squeeze; it rises linearly to the scheduler's value."""
        steps = 0 if self.squeezer is None else self.squeezer.config.rewarmup_steps
        since = steps if self._last_squeeze is None else state.global_step - self._last_squeeze
        if since < steps:
            groups = kwargs["optimizer"].param_groups
            self._rates = [group["lr"] for group in groups]
            for group in groups:
                group["lr"] = group["lr"] * (since + 1) / (steps + 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores the scheduler's learning rates."""
        if self._rates is not None:
            for group, rate in zip(kwargs["optimizer"].param_groups, self._rates, strict=True):
                group["lr"] = rate
            self._rates = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the adapter a plain LoRA, unless `finalize=False`."""
        if self.squeezer is not None and self.squeezer.stages and self.squeezer.config.finalize:
            self.squeezer.finalize(kwargs.get("optimizer"))


class RefactorizeCallback(TrainerCallback):
    """Calls `refactorize_` every few optimizer steps in `transformers.Trainer`.

    Args:
        every: Number of optimizer steps between two calls.
        adapter_name: Name of the adapter.
        optimizer_state: `"reset"` (default) deletes the optimizer's state of the factors each time, `"project"` maps
            Adam's moments.

    Raises:
        ValueError: If an argument is invalid.

    Examples:
        >>> from peft_zoo.squeeze_lora import RefactorizeCallback
        >>> RefactorizeCallback(every=100).every  # Trainer(..., callbacks=[RefactorizeCallback(every=100)])
        100
    """

    def __init__(self, every: int = 100, adapter_name: str = "default", optimizer_state: str = "reset") -> None:
        check_count("every", every)
        SqueezeConfig(optimizer_state=optimizer_state)  # validates it
        self.every, self.adapter_name, self.optimizer_state = every, adapter_name, optimizer_state

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Balances the factors at multiples of `every`."""
        if state.global_step % self.every == 0:
            refactorize_(kwargs["model"], self.adapter_name, kwargs["optimizer"], self.optimizer_state)
