"""Finds the tasks: each package of `peft_zoo.tasks` that defines `EXTRA` is one, with a class such as `LanguageTask`.

A task is imported when it is loaded, so that training a language model does not need timm.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from peft_zoo.common.lazy import read_literal
from peft_zoo.common.values import needs_extra, unknown

if TYPE_CHECKING:
    from peft_zoo.tasks.base.settings import TrainSettings
    from peft_zoo.tasks.base.task import Task


def task_extras() -> dict[str, str]:
    """Maps the name of each task to the extra of peft-zoo that installs its packages, without importing the task."""
    packages = sorted(Path(__file__).parents[1].glob("*/__init__.py"))
    extras = {path.parent.name: read_literal(path, "EXTRA") for path in packages}
    return {name: extra for name, extra in extras.items() if extra is not None}


def check_task_name(name: str) -> None:
    """Raises a SettingError that lists the tasks unless `name` is one."""
    if name not in task_extras():
        raise unknown("task", name, task_extras())


def load_task(settings: TrainSettings) -> Task:
    """Imports the task that `settings` names and returns it with its settings completed."""
    check_task_name(settings.task)
    with needs_extra(f"--task {settings.task}", task_extras()[settings.task]):
        module = import_module(f"peft_zoo.tasks.{settings.task}")
    task: Task = getattr(module, f"{settings.task.capitalize()}Task")(settings)
    return task
