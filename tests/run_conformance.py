"""Runs peft's own test-suite on every registered method: `python tests/run_conformance.py [--full] [pytest options]`.

The harness lies beside the checkout in `shared/conformance`, or where `PEFT_CONFORMANCE_DIR` points.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

HARNESS = Path(os.environ.get("PEFT_CONFORMANCE_DIR", Path(__file__).parents[2] / "shared" / "conformance"))
LIST = Path(__file__).with_name("conformance_list.py")

if __name__ == "__main__":
    sys.argv = [str(HARNESS / "run.py"), str(LIST), *sys.argv[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
