"""Runs `fuzz_loading_cases.py` in a process with one thread: it forks, and locks of other threads would stay locked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("fuzz_loading_cases.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="cases run in forked processes")
@pytest.mark.timeout(14_400)
def test_mutated_adapters_on_every_route(pytestconfig: pytest.Config) -> None:
    options = ["-q", "-p", "no:cacheprovider", *(["--full"] if pytestconfig.getoption("--full") else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(CASES)],
        env={name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")},
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:]
    assert " passed" in run.stdout
