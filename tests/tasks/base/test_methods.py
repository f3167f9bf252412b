from __future__ import annotations

import dataclasses

import pytest
from peft import LoraConfig

from peft_zoo.common.values import SettingError
from peft_zoo.registration import methods
from peft_zoo.tasks.base.methods import (
    BASELINE,
    TABLE_WIDTH,
    build_config,
    callbacks,
    check_options,
    config_class,
    method_table,
)
from peft_zoo.tasks.base.registry import load_task
from peft_zoo.tasks.base.settings import TrainSettings

TRAINABLE = [name for name, method in methods().items() if method.trainable]
SCHEDULED = [name for name, method in methods().items() if hasattr(method.config_cls, "target_sparsity")]


@pytest.mark.parametrize("name", [*TRAINABLE, BASELINE])
def test_every_method_is_built_from_text(name: str) -> None:
    config = build_config(name, {"target_modules": "q_proj,v_proj"}, {"target_modules": "all-linear"}, steps=10)
    assert isinstance(config, config_class(name))
    assert config.target_modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize("name", [*TRAINABLE, BASELINE])
def test_task_defaults_hold_where_the_user_said_nothing(name: str) -> None:
    config = build_config(name, {}, {"target_modules": "all-linear", "no_such_field": 1}, steps=10)
    assert config.target_modules == "all-linear"


def test_unknown_methods_list_every_registered_one() -> None:
    with pytest.raises(SettingError) as caught:
        config_class("snel")
    assert all(name in str(caught.value) for name in [*methods(), BASELINE])


@pytest.mark.parametrize("name", [name for name in methods() if name not in TRAINABLE])
def test_a_recipe_is_not_trained(name: str) -> None:
    with pytest.raises(SettingError, match=f"method '{name}' has nothing to train"):
        check_options(name, {})


def test_unknown_fields_list_the_valid_ones_but_not_the_book_keeping() -> None:
    with pytest.raises(SettingError, match="did you mean 'lora_alpha'") as caught:
        check_options("lora", {"lora_alfa": "8"})
    assert "peft_type" not in str(caught.value)
    assert "base_model_name_or_path" not in str(caught.value)


def test_a_value_of_the_wrong_type_names_method_field_value_and_fix() -> None:
    with pytest.raises(SettingError, match=r"lora field 'r' cannot be 'big': give a whole number"):
        check_options("lora", {"r": "big"})


@pytest.mark.parametrize("name", TRAINABLE)
def test_what_the_configuration_refuses_is_passed_on_as_a_sentence(name: str) -> None:
    with pytest.raises(SettingError, match=r"\br\b.*-3"):
        check_options(name, {"r": "-3"})


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_gets_the_length_of_the_run(name: str) -> None:
    assert build_config(name, {"target_sparsity": "0.95"}, {}, steps=77).total_step == 77  # type: ignore[attr-defined]
    given = build_config(name, {"target_sparsity": "0.95", "total_step": "9"}, {}, steps=77)
    assert given.total_step == 9  # type: ignore[attr-defined]
    assert build_config(name, {}, {}, steps=77).total_step is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_rank": "8", "num_stages": "3"}, "schedule has 3 stages but only 38 steps"),
        ({"target_rank": "64"}, "target_rank=64 cannot be used; use less than r=64"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_a_sentence(options: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        build_config("squeeze_lora", {"r": "64", **options}, {}, steps=50)


def test_a_method_may_suggest_its_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    default = load_task(TrainSettings(method=BASELINE)).settings.learning_rate
    assert default is not None
    monkeypatch.setattr(LoraConfig, "suggested_learning_rate", 10 * default, raising=False)
    assert load_task(TrainSettings(method=BASELINE)).settings.learning_rate == 10 * default
    assert load_task(TrainSettings(method=BASELINE, learning_rate=0.5)).settings.learning_rate == 0.5
    assert load_task(TrainSettings()).settings.learning_rate == default


def test_the_baseline_wants_no_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert callbacks(BASELINE, object()) == []  # type: ignore[arg-type]


def test_a_method_with_a_callback_gets_it_made_from_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    method = next(iter(methods().values()))
    marked = dataclasses.replace(method, callback=lambda model: ("callback of", model))
    monkeypatch.setattr("peft_zoo.tasks.base.methods.methods", lambda: {method.name: marked})
    assert callbacks(method.name, "the model") == [("callback of", "the model")]  # type: ignore[arg-type]


def test_the_table_shows_what_each_method_costs() -> None:
    table = method_table()
    for method in methods().values():
        for text in (method.name, method.summary, method.parameters, method.memory, method.flops, method.paper):
            assert text in " ".join(table.split())
        assert all(field.name in table for field in dataclasses.fields(method.config_cls) if field.name == "r")
    assert max(len(line) for line in table.splitlines()) <= TABLE_WIDTH
    assert "base_model_name_or_path" not in table
    assert issubclass(config_class(BASELINE), LoraConfig)
