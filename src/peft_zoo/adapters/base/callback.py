"""Base of the `transformers.Trainer` callbacks of methods that act at each optimizer step."""

from __future__ import annotations

import secrets
import warnings
from pathlib import Path
from typing import Any, ClassVar, Protocol

from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from peft_zoo.common.atomic import replaced_file
from peft_zoo.io.safetensors import TensorFile


class Stepper(Protocol):
    """An object that acts after each optimizer step and can be saved and restored."""

    def step(self, global_step: int) -> bool:
        """Acts after optimizer step `global_step` (from 1), before gradients are cleared; True if it made a change."""

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state that resuming needs."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned; if it does not fit, raises a ValueError and changes nothing."""


class StepCallback(TrainerCallback):
    """Calls a `Stepper` in `transformers.Trainer` and saves its state as file `file_name` in each checkpoint.

    The state of the `Trainer` records the output folder and a random name of the run, which each file repeats: so a run
    that resumes into another output folder finds its file, and not that of another run.

    Args:
        stepper: Object to call after each optimizer step.
    """

    file_name: ClassVar[str]

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self._run = secrets.token_hex(8)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Calls the stepper after the optimizer; `state.global_step` does not yet count this step."""
        self.stepper.step(state.global_step + 1)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves the state in the checkpoint; each process its own, since FSDP shards it."""
        with replaced_file(self._file(Path(args.output_dir), args, state)) as draft:
            save_file(self.stepper.state_dict(), draft, metadata={"run": self._run})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores the state from the checkpoint that training resumes from.

        Raises:
            ValueError: If the checkpoint was written with this callback but its file is missing or does not fit.
        """
        record = state.stateful_callbacks.get(self.file_name)  # not the name of the class, which is Trainer's own key
        if state.global_step > 0:
            self._restore(args, state, record if isinstance(record, dict) else {})
        state.stateful_callbacks[self.file_name] = {"folder": str(Path(args.output_dir).absolute()), "run": self._run}

    def _restore(self, args: Any, state: Any, record: dict[str, Any]) -> None:
        given = args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else None
        folders = [Path(folder) for folder in (record.get("folder"), args.output_dir) if isinstance(folder, str)]
        paths = [self._file(folder, args, state) for folder in folders]
        paths = [Path(given) / paths[0].name, *paths] if given else paths
        for path in dict.fromkeys(paths):
            if not path.exists():
                continue
            with TensorFile(path) as file:
                is_main = args.process_index == 0  # the record is that of the first process
                if is_main and record and file.metadata.get("run") != record.get("run"):
                    continue
                self._load(path, {key: file.read(key) for key in file.tensors})
            return
        if record:
            raise ValueError(
                f"{paths[-1]} is missing: {type(self).__name__} cannot resume without it. Give the checkpoint's folder "
                "as `resume_from_checkpoint` of TrainingArguments, too."
            )
        warnings.warn(f"{paths[-1]} is missing; {type(self).__name__} starts with a new state.", stacklevel=4)

    def _load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        try:
            self.stepper.load_state_dict(tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _file(self, folder: Path, args: Any, state: Any) -> Path:
        rank = f"_{args.process_index}" if args.world_size > 1 else ""  # as transformers does with `rng_state.pth`
        path = folder / f"checkpoint-{state.global_step}" / self.file_name
        return path.with_stem(path.stem + rank)
