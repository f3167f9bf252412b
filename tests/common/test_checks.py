"""Validation of arguments: valid values pass, errors name field and value."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from peft_zoo.common.checks import check_count, check_share, is_number, require


@pytest.mark.parametrize("value", [None, 1, 3])
def test_valid_counts(value: int | None) -> None:
    check_count("steps", value)
    check_count("steps", 0, least=0)


@pytest.mark.parametrize(("value", "least"), [(0, 1), (199, 200), (True, 1), (2.0, 1), ("3", 1)])
def test_invalid_counts_are_named(value: Any, least: int) -> None:
    with pytest.raises(ValueError, match=f"steps={value!r} .* {least}"):
        check_count("steps", value, least)


@pytest.mark.parametrize("value", [0, -0.1, 1.01, True, math.nan, "half"])
def test_a_share_is_in_zero_to_one(value: Any) -> None:
    check_share("energy", None)
    check_share("energy", 1)
    with pytest.raises(ValueError, match=f"energy={value!r}"):
        check_share("energy", value)


def test_only_finite_ints_and_floats_are_numbers() -> None:
    assert (
        is_number(1) and is_number(-0.5) and not any(map(is_number, (True, math.inf, math.nan, "1", None, 1j, 10**400)))
    )


def test_requirements_name_the_owner_the_field_and_the_fix() -> None:
    owner = SimpleNamespace(r=0)
    require(True, owner, "r", "use more")
    with pytest.raises(ValueError, match=r"SimpleNamespace: r=0 .*use more"):
        require(False, owner, "r", "use more")
