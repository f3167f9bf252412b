"""Adapters that peft saved, once for all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.merge.samples import KINDS, saved

Original = Callable[[str], Path]


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    """The folder of an adapter of `KINDS`, to be read only."""
    root, made = tmp_path_factory.mktemp("originals"), set[str]()

    def folder(kind: str) -> Path:
        if kind not in made:
            saved(root / kind, **KINDS[kind])
            made.add(kind)
        return root / kind

    return folder
