from __future__ import annotations

import pytest

from peft_zoo.common.values import SettingError
from peft_zoo.tasks.base.registry import load_task, task_extras
from peft_zoo.tasks.base.settings import TrainSettings


def test_the_tasks_are_found_in_their_folders() -> None:
    assert task_extras() == {"diffusion": "diffusion", "language": "tasks", "vision": "vision"}


@pytest.mark.parametrize("name", task_extras())
def test_every_task_loads_and_completes_its_settings(name: str) -> None:
    task = load_task(TrainSettings(task=name, steps=7))
    assert task.name == name
    assert task.settings.steps == 7
    assert task.settings.batch_size == task.defaults["batch_size"]


def test_unknown_tasks_list_the_valid_ones() -> None:
    with pytest.raises(SettingError, match=r"'langage'.*'language'"):
        load_task(TrainSettings(task="langage"))


@pytest.mark.parametrize(
    ("task", "field"),
    [("language", "image_size"), ("language", "concept"), ("vision", "max_length"), ("diffusion", "image_size")],
)
def test_settings_of_another_task_are_refused(task: str, field: str) -> None:
    with pytest.raises(SettingError, match=f"--{field.replace('_', '-')} belongs to --task"):
        load_task(TrainSettings(task=task, **{field: 14}))


def test_a_missing_package_is_answered_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name}", name="timm")

    monkeypatch.setattr("peft_zoo.tasks.base.registry.import_module", missing)
    with pytest.raises(SettingError, match=r"timm.*peft-zoo\[vision\]"):
        load_task(TrainSettings(task="vision"))
