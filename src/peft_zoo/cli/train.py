"""`peft-zoo train`: fine-tunes a real model with one method and checks the saved adapter."""

from __future__ import annotations

import os

from peft_zoo.adapters import public_names
from peft_zoo.cli.shared import Command, Facts, Result
from peft_zoo.common.values import unknown
from peft_zoo.tasks.base.registry import check_task_name
from peft_zoo.tasks.base.settings import BASELINE, PRESETS, TrainSettings

EPILOG = """examples:
  peft-zoo train --preset demo
  peft-zoo train --method snell --model smollm2-135m --data gsm8k --steps 100 --set r=16 --set sparsity=0.5
  peft-zoo train --task vision --method snell --data images/ --set r=8
  peft-zoo train --task diffusion --method lora --concept checker --data fashion-mnist
  peft-zoo train --config run.yaml --seed 1

A --config file has the flags as keys (steps: 60) and the method's fields under set. Flags win over the file, the file
wins over the preset. Built-in models and data: smollm2-135m with shakespeare or gsm8k (language), dinov2-small
(vision), fashion-mnist-denoiser with fashion-mnist (diffusion)."""


def check_methods(*names: str | None) -> None:
    """Raises a SettingError unless each name is a method of this package, peft's LoRA or None, without importing it."""
    valid = [*(module.rpartition(".")[2] for module in public_names()), BASELINE]
    for name in names:
        if name is not None and name not in valid:
            raise unknown("method", name, valid)


def _check(settings: TrainSettings) -> None:
    check_task_name(settings.task)
    check_methods(settings.method)


def _plan(settings: TrainSettings) -> Facts:
    from peft_zoo.tasks.base.registry import load_task
    from peft_zoo.tasks.base.training import check_settings

    task = load_task(settings)
    check_settings(task)
    return {name: value for name, value in vars(task.settings).items() if value is not None}


def _run(settings: TrainSettings) -> Result:
    from peft_zoo.tasks.base.registry import load_task
    from peft_zoo.tasks.base.report import summary_text
    from peft_zoo.tasks.base.training import train

    outcome = train(load_task(settings))
    text = f"\n{summary_text(outcome)}\n\n  report: {os.path.join(settings.output, 'report.html')}"
    return Result(text, outcome.summary(), outcome.reload_matches and outcome.merge_matches)


COMMAND = Command(
    "fine-tune a real model on real data",
    _run,
    TrainSettings,
    _check,
    _plan,
    description="Fine-tune, evaluate before and after, save, reload, merge, and write report.html.",
    epilog=EPILOG,
    presets=PRESETS,
    mistakes=(),  # an unexpected error of a training run needs its traceback
)
