from __future__ import annotations

from pathlib import Path

import pytest

from peft_zoo.common.values import SettingError
from peft_zoo.tasks.base.settings import (
    TrainSettings,
    flag_fields,
    preset_names,
    read_preset,
    read_settings_file,
    resolve_settings,
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_later_layers_win_and_options_merge_key_by_key() -> None:
    settings = resolve_settings(
        {"steps": 10, "learning_rate": 0.1, "options": {"r": 4, "sparsity": 0.5}},
        {"steps": 20, "options": {"r": 8}},
        {"seed": "3"},
    )
    assert (settings.steps, settings.learning_rate, settings.seed) == (20, 0.1, 3)
    assert settings.options == {"r": "8", "sparsity": "0.5"}


def test_a_file_takes_flag_names_with_either_dash(tmp_path: Path) -> None:
    path = write(
        tmp_path / "run.yaml", "batch-size: 4\nlearning_rate: 1e-3\nmethod: null\nset:\n  r: 16\n  bias: none\n"
    )
    layer = read_settings_file(path)
    settings = resolve_settings(layer)
    assert (settings.batch_size, settings.learning_rate, settings.method) == (4, 1e-3, None)
    assert settings.options == {"r": "16", "bias": "none"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("stepz: 3", ["'stepz'", "did you mean 'steps'", "learning-rate", "set"]),
        ("- steps", ["no mapping", "steps: 60"]),
        ("a: [", ["is not YAML"]),
        ("set: 3", ["set cannot be 3"]),
    ],
)
def test_a_bad_file_is_answered_with_one_sentence(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(SettingError) as caught:
        read_settings_file(write(tmp_path / "run.yaml", text))
    assert all(part in str(caught.value) for part in parts)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"nothing\.yaml.*cannot be read"):
        read_settings_file(tmp_path / "nothing.yaml")


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


@pytest.mark.parametrize("name", preset_names())
def test_every_shipped_preset_resolves(name: str) -> None:
    assert resolve_settings(read_preset(name)).method is not None


def test_unknown_presets_list_the_valid_ones() -> None:
    with pytest.raises(SettingError, match="unknown preset 'dem': did you mean 'demo'"):
        read_preset("dem")


def test_every_field_says_what_it_is() -> None:
    assert all(item.metadata["help"] for item in flag_fields())
