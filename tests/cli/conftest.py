"""Fixtures for the tests of all commands."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence

import pytest

from peft_zoo.cli.main import main

Mistake = Callable[[Sequence[str]], str]


@pytest.fixture(autouse=True)
def untouched_process() -> Iterator[None]:
    """Restores what `main` sets up for its process."""
    root, own = logging.getLogger(), logging.getLogger("peft_zoo")
    handlers, level = root.handlers[:], own.level
    with warnings.catch_warnings():
        yield
    root.handlers[:] = handlers
    own.setLevel(level)


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str]) -> Mistake:
    """Runs an invalid command line; checks status 2 and empty stdout, and returns the one line of stderr."""

    def run(words: Sequence[str]) -> str:
        capsys.readouterr()
        assert main(list(words)) == 2
        streams = capsys.readouterr()
        assert streams.out == ""
        line = streams.err.splitlines()[-1]
        assert line.startswith("peft-zoo: ") and "Traceback" not in streams.err
        return line

    return run
