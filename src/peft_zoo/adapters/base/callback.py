"""The `transformers.Trainer` callback of methods that change during training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback


class Stepper(Protocol):
    """What changes during training, one optimizer step at a time."""

    def step(self, global_step: int) -> bool:
        """Act after optimizer step `global_step` (1-based), its gradients still there; True if something changed."""

    def state_dict(self) -> dict[str, Tensor]:
        """What is needed to go on after an interruption."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up where `state_dict` left off."""


class StepCallback(TrainerCallback):
    """Runs a `Stepper` inside `transformers.Trainer` and keeps its state beside every checkpoint.

    Args:
        stepper: What to run.
    """

    file_name: ClassVar[str]

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer's step and before gradients are cleared; `state.global_step` counts the steps before."""
        self.stepper.step(state.global_step + 1)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the state in the checkpoint's folder; every process its own, which with FSDP is a part."""
        save_file(self.stepper.state_dict(), self._file(args, state))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the state of the checkpoint that training resumes from."""
        if state.global_step == 0:
            return
        path = self._file(args, state)
        if path.exists():
            self.stepper.load_state_dict(load_file(path))
        else:
            warnings.warn(f"{path} is missing; {type(self).__name__} starts from nothing.", stacklevel=2)

    def _file(self, args: Any, state: Any) -> Path:
        rank = f"_{args.process_index}" if args.world_size > 1 else ""  # as transformers does with `rng_state.pth`
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.file_name
        return path.with_stem(path.stem + rank)
