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


@pytest.mark.parametrize("name", [*TRAINABLE, BASELINE])
def test_every_method_is_built_from_text_and_the_defaults_of_the_task(name: str) -> None:
    defaults = {"target_modules": "all-linear", "no_such_field": 1}
    config = build_config(name, {"target_modules": "q_proj,v_proj"}, defaults, steps=10)
    assert isinstance(config, config_class(name))
    assert config.target_modules == {"q_proj", "v_proj"}
    assert build_config(name, {}, defaults).target_modules == "all-linear"


def test_unknown_methods_list_every_registered_one() -> None:
    with pytest.raises(SettingError) as caught:
        config_class("snel")
    assert all(name in str(caught.value) for name in [*methods(), BASELINE])


@pytest.mark.parametrize("name", [name for name in methods() if name not in TRAINABLE])
def test_a_recipe_is_not_trained(name: str) -> None:
    with pytest.raises(SettingError, match=f"'{name}'"):
        check_options(name, {}, 10)


def test_unknown_fields_list_the_valid_ones_but_not_the_book_keeping() -> None:
    with pytest.raises(SettingError, match="lora_alpha") as caught:
        check_options("lora", {"lora_alfa": "8"}, 10)
    assert "peft_type" not in str(caught.value)
    assert "base_model_name_or_path" not in str(caught.value)


def test_a_value_of_the_wrong_type_names_method_field_value_and_fix() -> None:
    with pytest.raises(SettingError, match=r"lora field 'r'.*'big'"):
        check_options("lora", {"r": "big"}, 10)


@pytest.mark.parametrize("name", TRAINABLE)
def test_what_the_configuration_refuses_is_passed_on_as_a_sentence(name: str) -> None:
    with pytest.raises(SettingError, match=r"\br\b.*-3"):
        check_options(name, {"r": "-3"}, 10)


def test_a_schedule_gets_the_length_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_rank(config: LoraConfig, steps: int) -> LoraConfig:
        return dataclasses.replace(config, r=steps)

    monkeypatch.setattr(LoraConfig, "for_training", with_rank, raising=False)
    assert build_config(BASELINE, {"r": "2"}, {}, steps=77).r == 77  # type: ignore[attr-defined]
    assert build_config(BASELINE, {"r": "2"}, {}).r == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", TRAINABLE)
def test_without_a_schedule_any_number_of_steps_fits(name: str) -> None:
    check_options(name, {}, 1)


def test_a_schedule_that_does_not_fit_the_run_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(config: LoraConfig, steps: int) -> LoraConfig:
        raise ValueError(f"r={config.r} does not fit {steps} steps")

    monkeypatch.setattr(LoraConfig, "for_training", refuse, raising=False)
    with pytest.raises(SettingError, match="r=64 does not fit 50 steps"):
        check_options(BASELINE, {"r": "64"}, steps=50)


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
