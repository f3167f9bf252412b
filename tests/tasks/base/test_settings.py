from __future__ import annotations

import pytest

from peft_zoo.common.settings import read_settings_file, resolve_settings, setting_fields
from peft_zoo.common.values import SettingError
from peft_zoo.tasks.base.settings import PRESETS, TrainSettings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("max_length", 0),
        ("eval_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", -1.0),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_numbers_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(SettingError, match=f"--{field.replace('_', '-')} cannot be {value}"):
        TrainSettings(**{field: value})


def test_defaults_fill_only_what_is_missing() -> None:
    settings = TrainSettings(steps=5).completed({"steps": 100, "batch_size": 2})
    assert (settings.steps, settings.batch_size) == (5, 2)


@pytest.mark.parametrize("name", PRESETS)
def test_every_shipped_preset_resolves(name: str) -> None:
    assert resolve_settings(TrainSettings, read_settings_file(PRESETS[name], TrainSettings)).method is not None


def test_every_field_says_what_it_is() -> None:
    assert all(item.metadata["help"] for item in setting_fields(TrainSettings))
