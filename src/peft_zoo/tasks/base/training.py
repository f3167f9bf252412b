"""Trains one adapter through `transformers.Trainer`, and scores it before and after training, reloading and merging."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from peft_zoo.common.values import SettingError
from peft_zoo.tasks.base.methods import build_config, callbacks, check_options
from peft_zoo.tasks.base.outcome import Outcome, Score
from peft_zoo.tasks.base.report import report_html
from peft_zoo.tasks.base.task import Splits, Task

_log = logging.getLogger(__name__)

EVALUATION_BATCH = 4  # times the training batch size: evaluation keeps nothing for a backward pass


def train(task: Task) -> Outcome:
    """Trains an adapter; writes `adapter_model.safetensors`, `summary.json`, `report.html` into the output folder."""
    check_settings(task)
    outcome = _new_outcome(task)
    output = output_folder(task.settings.output)
    with _timed(outcome, "all"):
        with _timed(outcome, "load"):
            data = task.load_data()
            base = task.load_model()
        _evaluate_stage(outcome, "before", task, base, data)
        with _timed(outcome, "train"):
            # A fresh base: accelerate marks an evaluated model as prepared and would not make it data-parallel.
            model = adapt(task, base := task.load_model())
            outcome.trainable_parameters, outcome.total_parameters = model.get_nb_trainable_parameters()
            outcome.losses = fit(task, model, data.train)
        _evaluate_stage(outcome, "after", task, model, data)
        _save(model, output)
        del base, model
        _check_saved(outcome, task, data, output)
    outcome.adapter_bytes = (output / "adapter_model.safetensors").stat().st_size
    outcome.peak_memory_bytes = _peak_memory()
    if PartialState().is_main_process:
        (output / "summary.json").write_text(json.dumps(outcome.summary(), indent=2) + "\n", encoding="utf-8")
        (output / "report.html").write_text(report_html(outcome), encoding="utf-8")
    return outcome


def check_settings(task: Task) -> None:
    """Validates the settings of a run before anything is loaded."""
    settings = task.settings
    settings.require("model", "give a built-in model, a Hub id or a path.")
    settings.require("data", f"give {task.data_choices}.")
    method = settings.require("method", "choose one, as listed by `peft-zoo methods`.")
    check_options(method, settings.options, settings.require("steps", "give a number of optimizer steps."))


def _new_outcome(task: Task) -> Outcome:
    """Returns an outcome without results."""
    settings = task.settings
    _log.info("loading %s and %s", settings.model, settings.data)
    return Outcome(
        task=task.name,
        method=str(settings.method),
        model=str(settings.model),
        data=str(settings.data),
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        note=task.note,
        settings=vars(settings),
    )


def adapt(task: Task, base: nn.Module) -> PeftModel:
    """Adds the adapter of the task's method to `base`; its initial values depend on the seed alone."""
    settings = task.settings
    config = build_config(
        settings.require("method", "choose one."),
        settings.options,
        task.adapter_defaults(base),
        settings.require("steps", "give a number of optimizer steps."),
    )
    set_seed(settings.seed)
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise SettingError(" ".join(str(error).split())) from error


def fit(task: Task, model: PeftModel, data: Dataset[Any]) -> list[tuple[int, float]]:
    """Trains the adapter in place through `transformers.Trainer`; returns pairs of optimizer step and training loss."""
    trainer = _trainer(task, model, train_dataset=data, callbacks=callbacks(str(task.settings.method), model))
    _log.info("training %s for %d steps", task.settings.method, task.settings.steps)
    trainer.train()
    return [(int(entry["step"]), entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def evaluate(task: Task, model: nn.Module, data: Dataset[Any]) -> Score:
    """Returns the task's metric and the mean loss of `model` on `data`, through `Trainer.evaluate`."""
    metrics = _trainer(task, model, eval_dataset=data).evaluate()
    return Score(task.score(metrics), metrics["eval_loss"])


class LossBar(ProgressCallback):
    """Progress bar of transformers that shows the loss, instead of printing one line per step."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows the latest loss at the end of the bar."""
        if self.training_bar is not None and logs is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


def _trainer(task: Task, model: nn.Module, callbacks: list[TrainerCallback] | None = None, **data: Any) -> Trainer:
    """Returns a `Trainer` without checkpoints and logging services."""
    settings = task.settings
    arguments = TrainingArguments(
        output_dir=settings.output,
        max_steps=settings.steps or 1,
        per_device_train_batch_size=settings.batch_size or 1,
        per_device_eval_batch_size=EVALUATION_BATCH * (settings.batch_size or 1),
        learning_rate=settings.learning_rate or 0.0,
        warmup_steps=(settings.steps or 1) // 10,
        seed=settings.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        label_names=["labels"],
        remove_unused_columns=False,
        prediction_loss_only=task.prediction_metrics() is None,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        task.trained_module(model),
        arguments,
        data_collator=task.collate,
        compute_metrics=task.prediction_metrics(),
        callbacks=callbacks,
        **data,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if sys.stderr.isatty():
        trainer.add_callback(LossBar())
    return trainer


def _evaluate_stage(outcome: Outcome, stage: str, task: Task, model: nn.Module, data: Splits) -> None:
    """Scores `model` on the test split and records the score and the time under `stage`."""
    with _timed(outcome, stage):
        _log.info("evaluating: %s", stage)
        outcome.scores[stage] = evaluate(task, model, data.test)


def _save(model: PeftModel, output: Path) -> None:
    """Saves the adapter from the main process only."""
    state = PartialState()
    if state.is_main_process:
        model.save_pretrained(str(output))
    state.wait_for_everyone()


def _check_saved(outcome: Outcome, task: Task, data: Splits, output: Path) -> None:
    """Loads the saved adapter onto a fresh base, scores it, merges it and scores it again."""
    model = PeftModel.from_pretrained(task.load_model(), str(output))
    _evaluate_stage(outcome, "reloaded", task, model, data)
    _evaluate_stage(outcome, "merged", task, model.merge_and_unload(), data)


def output_folder(name: str) -> Path:
    """Creates the output folder; call it before any work is done."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(
            f"--output {name!r} cannot be created: {error.strerror}; give a folder you may write to."
        ) from error
    return folder


@contextmanager
def _timed(outcome: Outcome, stage: str) -> Iterator[None]:
    """Records the wall-clock seconds of a `with` block under `stage`."""
    start = time.perf_counter()
    yield
    outcome.seconds[stage] = time.perf_counter() - start


def _peak_memory() -> int:
    """Returns the peak resident memory of this process in bytes; 0 on Windows, which does not report it."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB
