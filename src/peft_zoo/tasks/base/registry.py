"""The tasks by name. A task is imported when it is loaded, so that nobody needs timm to train a language model."""

from __future__ import annotations

from importlib import import_module

from peft_zoo.common.values import SettingError, unknown
from peft_zoo.tasks.base.settings import TrainSettings
from peft_zoo.tasks.base.task import Task

# Package of this floor -> its Task class and the extra of peft-zoo that installs what it needs.
TASKS = {
    "language": ("LanguageTask", "tasks"),
    "vision": ("VisionTask", "vision"),
    "diffusion": ("DiffusionTask", "diffusion"),
}


def load_task(settings: TrainSettings) -> Task:
    """The task that `settings` asks for.

    Raises:
        SettingError: If there is no such task, a package it needs is missing, or a setting does not belong to it.
    """
    if settings.task not in TASKS:
        raise unknown("task", settings.task, TASKS)
    class_name, extra = TASKS[settings.task]
    try:
        module = import_module(f"peft_zoo.tasks.{settings.task}")
    except ModuleNotFoundError as error:
        raise SettingError(
            f"--task {settings.task} needs the package {error.name}: run \"pip install 'peft-zoo[{extra}]'\"."
        ) from error
    task: Task = getattr(module, class_name)(settings)
    return task
