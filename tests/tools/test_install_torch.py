"""Choice of the torch build and its index; pip itself is replaced."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from types import SimpleNamespace

import pytest

import install_torch

VERSION = next(line for line in install_torch.CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
CPU = ["--no-deps", "--index-url", install_torch.CPU_INDEX]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Runs the program in a described environment and returns the arguments of each `pip install`."""

    def run(installed: str = "", gpu: bool = False, pulls: str = "", index: str = "") -> list[list[str]]:
        calls: list[list[str]] = []
        report = json.dumps({"install": [{"metadata": {"name": name}} for name in ("torch", pulls)]})
        found = [SimpleNamespace(version=installed)] if installed else []
        monkeypatch.setattr(install_torch, "distributions", lambda name: found)
        monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if gpu else None)
        monkeypatch.setattr(subprocess, "check_output", lambda command: report)
        monkeypatch.setattr(subprocess, "check_call", lambda command: calls.append(command[len(install_torch.PIP) :]))
        monkeypatch.delenv("PEFT_ZOO_TORCH_INDEX", raising=False)
        if index:
            monkeypatch.setenv("PEFT_ZOO_TORCH_INDEX", index)
        install_torch.main()
        return calls

    return run


def test_the_pinned_version_is_kept_whatever_its_build(install: Callable[..., list[list[str]]]) -> None:
    pinned = VERSION.removeprefix("torch==")
    assert install(installed=pinned) == install(installed=f"{pinned}+cpu") == []
    assert install(installed="2.6.0") == [[VERSION]]


@pytest.mark.parametrize("pulls", ["nvidia-cublas", "cuda-toolkit"])
def test_the_cpu_build_is_taken_where_cuda_would_come_without_a_gpu(
    install: Callable[..., list[list[str]]], pulls: str
) -> None:
    assert install(pulls=pulls) == [[*CPU, VERSION]]
    assert install(pulls=pulls, gpu=True) == [[VERSION]]


def test_the_usual_index_is_taken_where_it_brings_no_cuda(install: Callable[..., list[list[str]]]) -> None:
    assert install(pulls="sympy") == [[VERSION]]


def test_a_named_index_wins(install: Callable[..., list[list[str]]]) -> None:
    source = ["--no-deps", "--index-url", "https://example.org/simple"]
    assert install(pulls="nvidia-cublas", gpu=True, index=source[-1]) == [[*source, VERSION]]
