"""peft's own test-suite, quick profile, on every registered method; `make conformance` runs the full one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peft_zoo import methods
from tests.run_conformance import HARNESS

# Tests that a method passes: a skip must not hide a loss. Rows are doubled if a new adapter changes the output.
AT_LEAST, AT_LEAST_DOUBLED = 185, 250


@pytest.mark.conformance
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not HARNESS.is_dir(), reason=f"the conformance harness is not at {HARNESS.name} beside the checkout"
)
def test_pefts_own_tests_pass() -> None:
    script = Path(__file__).with_name("run_conformance.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"conformance: (\d+) passed, (\d+) failed", run.stdout)
    assert found, run.stdout[-3000:] + run.stderr[-3000:]
    assert run.returncode == 0 and found[2] == "0", run.stdout[-6000:]
    doubled = [bool(getattr(method.config_cls, "identity", {})) for method in methods().values() if method.trainable]
    assert int(found[1]) >= sum(AT_LEAST_DOUBLED if twice else AT_LEAST for twice in doubled)
