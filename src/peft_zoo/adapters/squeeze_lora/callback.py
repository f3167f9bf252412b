"""`transformers.Trainer` callbacks that lower the rank of a LoRA while it trains, or balance its factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from peft_zoo.adapters.squeeze_lora.finalize import resize_to
from peft_zoo.adapters.squeeze_lora.schedule import SqueezeConfig
from peft_zoo.adapters.squeeze_lora.squeezer import LoraSqueezer, refactorize_
from peft_zoo.kernels.planning.ranks import check_count


class SqueezeCallback(TrainerCallback, ExportableState):
    """Runs a `LoraSqueezer` inside `transformers.Trainer`, and leaves a plain LoRA at the end of training.

    Args:
        config: The schedule; None takes it from the adapter's `SqueezeLoraConfig`. A dict of its fields does too.
        adapter_name: The adapter; every other one is left alone.
        start: What the schedule starts from; a checkpoint remembers it.

    Attributes:
        squeezer: Made when training begins, which raises if the schedule does not fit the adapter or the number of
            steps.
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
        self._warm_from: int | None = None  # step of the last squeeze
        self._rates: list[float] | None = None  # the scheduler's, while smaller ones are in their place

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the arguments."""
        names = [item.name for item in fields(SqueezeConfig)]
        config = None if self.config is None else {name: asdict(self.config)[name] for name in names}
        return {"args": {"config": config, "adapter_name": self.adapter_name, "start": self.start}, "attributes": {}}

    @staticmethod
    def prepare_resume(model: nn.Module, checkpoint: str | Path, adapter_name: str = "default") -> None:
        """Gives a new model the tensor sizes of a checkpoint that shrink mode wrote; call it before `trainer.train`.

        Mask mode needs nothing: its sizes never change.

        Args:
            model: The `PeftModel`, as it was when the first run began.
            checkpoint: The `checkpoint-N` folder.
            adapter_name: The adapter.

        Raises:
            ValueError: If the checkpoint has no such adapter, or another set of modules.
        """
        resize_to(model, Path(checkpoint), adapter_name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads the schedule."""
        if state.global_step > 0 and self.start is None:
            saved = state.stateful_callbacks.get(type(self).__name__, {})
            saved = saved[0] if isinstance(saved, list) else saved
            self.start = saved.get("args", {}).get("start")
        self.squeezer = LoraSqueezer(kwargs["model"], state.max_steps, self.config, self.adapter_name, self.start)
        self.start = self.squeezer.start
        if self.squeezer.config.mode == "shrink" and args.load_best_model_at_end:
            raise ValueError("shrink mode is not supported with load_best_model_at_end=True; use mode='mask'.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Squeezes where the schedule says so, after the optimizer's step and before a checkpoint is written."""
        if self.squeezer is not None and self.squeezer.step(state.global_step, kwargs["optimizer"]):
            self._warm_from = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lets the learning rate rise again after a squeeze, linearly; the scheduler is not touched."""
        steps = 0 if self.squeezer is None else self.squeezer.config.rewarmup_steps
        since = steps if self._warm_from is None else state.global_step - self._warm_from
        if since < steps:
            groups = kwargs["optimizer"].param_groups
            self._rates = [group["lr"] for group in groups]
            for group in groups:
                group["lr"] = group["lr"] * (since + 1) / (steps + 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gives the scheduler its learning rate back."""
        if self._rates is not None:
            for group, rate in zip(kwargs["optimizer"].param_groups, self._rates, strict=True):
                group["lr"] = rate
            self._rates = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the adapter the small, plain LoRA that it has become."""
        if self.squeezer is not None and self.squeezer.stages and self.squeezer.config.finalize:
            self.squeezer.finalize(kwargs.get("optimizer"))


class RefactorizeCallback(TrainerCallback):
    """Balances the factors of an adapter every few optimizer steps (`refactorize_`).

    Args:
        every: Optimizer steps between two balances.
        adapter_name: The adapter.
        optimizer_state: `"reset"` starts the optimizer's moments of the factors anew each time, `"project"` lets them
            follow.

    Raises:
        ValueError: If an argument cannot be used.
    """

    def __init__(self, every: int = 100, adapter_name: str = "default", optimizer_state: str = "reset") -> None:
        check_count("every", every)
        SqueezeConfig(optimizer_state=optimizer_state)  # checks it
        self.every, self.adapter_name, self.optimizer_state = every, adapter_name, optimizer_state

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Balances after every so many steps."""
        if state.global_step % self.every == 0:
            refactorize_(kwargs["model"], self.adapter_name, kwargs["optimizer"], self.optimizer_state)


__all__ = ["RefactorizeCallback", "SqueezeCallback"]
