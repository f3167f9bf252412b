from __future__ import annotations

import typing
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from peft_zoo.common.values import SettingError, as_text, needs_extra, parse_value, unknown


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("8", int, 8),
        (" 8 ", int, 8),
        ("1e-3", float, 1e-3),
        ("8", float, 8.0),
        ("true", bool, True),
        ("Off", bool, False),
        ("none", float | None, None),
        ("0.5", typing.get_type_hints(LoraConfig)["lora_dropout"] | None, 0.5),
        ("none", str, "none"),
        ("all-linear", list[str] | str | None, "all-linear"),
        ("q_proj,v_proj", list[str] | str | None, ["q_proj", "v_proj"]),
        ('["q_proj"]', list[str] | str | None, ["q_proj"]),
        ("head", list[str] | None, ["head"]),
        ("3", list[int] | int | None, 3),
        ("1,2", list[int] | int | None, [1, 2]),
        ('{"q": 4}', dict[str, int], {"q": 4}),
        ("lora_only", Literal["none", "lora_only"], "lora_only"),
        ("gaussian", bool | Literal["gaussian"], "gaussian"),
        ("false", bool | Literal["gaussian"], False),
    ],
)
def test_parses_by_annotation(text: str, hint: Any, value: object) -> None:
    parsed = parse_value(text, hint, "field")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "hint", "fix"),
    [
        ("0.5", int, "a whole number"),
        ("eight", int | None, "a whole number"),
        ("nan", float, "a number"),
        ("inf", float, "a number"),
        ("maybe", bool, "true or false"),
        ("[1]", dict[str, int], "a JSON object"),
        ("x", list[int], "a list, for example 4,8,16"),
        ("both", Literal["none", "all"], "one of none, all"),
        ("x", object | None, "only Python code"),
    ],
)
def test_a_mistake_names_field_value_and_fix(text: str, hint: Any, fix: str) -> None:
    with pytest.raises(SettingError) as caught:
        parse_value(text, hint, "--some-field")
    message = str(caught.value)
    assert "--some-field" in message
    assert repr(text) in message
    assert fix in message
    assert "\n" not in message


def test_every_field_of_a_real_config_is_understood() -> None:
    hints = typing.get_type_hints(LoraConfig)
    assert parse_value("16", hints["r"], "r") == 16
    assert parse_value("q,v", hints["target_modules"], "target_modules") == ["q", "v"]
    assert parse_value("true", hints["use_rslora"], "use_rslora") is True
    assert parse_value('{"q": 4}', hints["rank_pattern"], "rank_pattern") == {"q": 4}


@settings(max_examples=50)
@given(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.integers(), max_size=5),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=5),
)
def test_values_survive_the_way_through_text(value: object, items: list[int], table: dict[str, int]) -> None:
    assert parse_value(as_text(value), bool | int | float | None, "field") == value
    assert parse_value(as_text(items), list[int], "field") == items
    assert parse_value(as_text(table), dict[str, int], "field") == table


def test_unknown_names_list_the_valid_ones_and_the_nearest() -> None:
    message = str(unknown("method", "snel", ["snell", "lora"]))
    assert "method 'snel'" in message and "did you mean 'snell'" in message and "snell, lora" in message
    assert "did you mean" not in str(unknown("method", "zzz", ["snell", "lora"]))


def test_a_missing_package_is_answered_with_the_command() -> None:
    with (
        pytest.raises(SettingError, match=r"--task vision.*timm.*peft-zoo\[vision\]"),
        needs_extra("--task vision", "vision"),
    ):
        raise ModuleNotFoundError("No module named timm", name="timm")
