"""Base of the `transformers.Trainer` callbacks of methods that act at each optimizer step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback


class Stepper(Protocol):
    """An object that acts after each optimizer step and can be saved and restored."""

    def step(self, global_step: int) -> bool:
        """Acts after optimizer step `global_step` (from 1), before gradients are cleared; True if it made a change."""

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state that resuming needs."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the state that `state_dict` returned."""


class StepCallback(TrainerCallback):
    """Calls a `Stepper` in `transformers.Trainer` and saves its state as file `file_name` in each checkpoint.

    Args:
        stepper: Object to call after each optimizer step.
    """

    file_name: ClassVar[str]

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Calls the stepper after the optimizer; `state.global_step` does not yet count this step."""
        self.stepper.step(state.global_step + 1)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves the state in the checkpoint; each process its own, since FSDP shards it."""
        save_file(self.stepper.state_dict(), self._file(args, state))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores the state from the checkpoint that training resumes from."""
        if state.global_step == 0:
            return
        path = self._file(args, state)
        if path.exists():
            self.stepper.load_state_dict(load_file(path))
        else:
            warnings.warn(f"{path} is missing; {type(self).__name__} starts with a new state.", stacklevel=2)

    def _file(self, args: Any, state: Any) -> Path:
        rank = f"_{args.process_index}" if args.world_size > 1 else ""  # as transformers does with `rng_state.pth`
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.file_name
        return path.with_stem(path.stem + rank)
