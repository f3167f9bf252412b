"""Every public name has an example in its docstring, and the examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from typing import Any

import pytest

import peft_zoo

PACKAGES = ["peft_zoo", "peft_zoo.calibration", "peft_zoo.kernels", "peft_zoo.merge"]
PACKAGES += [
    f"peft_zoo.{info.name}"
    for info in pkgutil.iter_modules(peft_zoo.__path__)
    if not info.ispkg and info.name[0] != "_"
]


def public_objects() -> dict[str, Any]:
    """The classes and functions that the front packages list, by the name of their definition."""
    found = {}
    for package in map(importlib.import_module, PACKAGES):
        for name in getattr(package, "__all__", []):
            value = getattr(package, name)
            if inspect.isclass(value) or inspect.isroutine(value):
                found[f"{value.__module__}.{name}"] = value
    return found


@pytest.mark.parametrize("name", sorted(public_objects()))
def test_a_public_name_has_an_example_that_runs(name: str) -> None:
    value = public_objects()[name]
    examples = [test for test in doctest.DocTestFinder(recurse=False).find(value, name) if test.examples]
    assert examples, f"{name} has no example in its docstring"
    for test in examples:
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test)
        assert result.failed == 0
