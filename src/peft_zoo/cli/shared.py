"""What commands that work on files share: a progress bar, and what the library says in one line each."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft_zoo.common.values import SettingError

if TYPE_CHECKING:
    from peft_zoo.common.progress import Progress


def progress_bar() -> Progress | None:
    """A bar on stderr if that is a terminal, and tqdm is there."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return None

    def bar(names: Iterable[str], doing: str) -> Iterable[str]:
        return tqdm(names, desc=doing, unit="module", leave=False, file=sys.stderr)

    return bar


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show each warning of the library as one line, without the place in the code."""

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        sys.stderr.write(f"peft-zoo: warning: {' '.join(str(message).split())}\n")

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning)
        warnings.showwarning = show
        yield


def sentence(error: Exception) -> str:
    """What an error says, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return " ".join(str(error).split())


def pairs(words: Sequence[str]) -> dict[str, str]:
    """Read `key=value` words.

    Raises:
        SettingError: If a word has no equals sign.
    """
    for word in words:
        if "=" not in word:
            raise SettingError(f"--set cannot be {word!r}: write key=value, for example --set r=8.")
    return dict(word.split("=", 1) for word in words)
