"""Base of all commands: description and result of a command, tables, progress bars and warnings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from peft_zoo.common.values import SettingError

Facts = Mapping[str, Any]
"""Lines of a table by their name."""


class Result(NamedTuple):
    """Text for a person, plain values for `--json`, and whether the exit status is 0 instead of 1."""

    text: str
    data: Any
    ok: bool = True


@dataclass(frozen=True)
class NoFlags:
    """Settings of a command without flags of its own."""


@dataclass(frozen=True)
class Command:
    """A command of `peft-zoo`; the module `peft_zoo.cli.NAME` defines it as `COMMAND` and imports nothing slow.

    Attributes:
        summary: One line for the list of commands.
        run: Does the work on an instance of `flags`, after the methods have been registered.
        flags: Settings dataclass whose fields are the flags, see `peft_zoo.common.settings`.
        check: Raises a SettingError if values do not fit together; called before torch is imported.
        plan: Validates what can be validated without the work, and returns what would be done, for `--dry-run`. A
            command without it has neither `--dry-run` nor `--config`.
        description: Text above the flags in `--help`; the summary if empty.
        epilog: Text below the flags.
        presets: YAML files by name, offered as `--preset`.
        mistakes: Exceptions of `run` that are mistakes of the user: reported in one sentence, without a traceback.
    """

    summary: str
    run: Callable[[Any], Result]
    flags: type[Any] = NoFlags
    check: Callable[[Any], None] | None = None
    plan: Callable[[Any], Facts] | None = None
    description: str = ""
    epilog: str = ""
    presets: Mapping[str, Path] = field(default_factory=dict)
    mistakes: tuple[type[Exception], ...] = (ValueError, NotImplementedError, OSError)


@dataclass(frozen=True)
class Group:
    """A command that consists of commands of its own, such as `peft-zoo watermark verify`."""

    summary: str
    commands: Mapping[str, Command]
    description: str = ""
    epilog: str = ""


def table(facts: Facts) -> str:
    """Formats facts as a table of two columns, with one line per item of a list."""
    lines = {key: value if isinstance(value, list) else [value] for key, value in facts.items()}
    return "\n".join(
        f"{'' if index else key:<12}{value}" for key, values in lines.items() for index, value in enumerate(values)
    )


def progress_bar(names: Iterable[str], doing: str) -> Iterable[str]:
    """Shows a progress bar labelled `doing` on stderr, if that is a terminal, while `names` are iterated."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(names, desc=doing, unit="module", leave=False, disable=None)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Prints each warning as one line on stderr, without file name and line number."""

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        sys.stderr.write(f"peft-zoo: warning: {' '.join(str(message).split())}\n")

    with warnings.catch_warnings():
        warnings.filterwarnings("default", category=UserWarning)
        warnings.showwarning = show
        yield


@contextmanager
def mistakes_as_sentences(kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turns exceptions of the given types into a `SettingError` with their text on one line."""
    try:
        yield
    except SettingError:
        raise
    except kinds as error:
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
        else:
            text = " ".join(str(error).split())
        raise SettingError(text) from error
