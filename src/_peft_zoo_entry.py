"""The program `peft-zoo`: prepares the process, then hands over to `peft_zoo.cli`."""

# A top-level module of its own: what it does must be done before `peft_zoo/__init__.py` imports torch and peft.

from __future__ import annotations

import os

from _peft_zoo_torchvision import declare_missing_ops


def main() -> int:
    """Run the command line and return its exit status."""
    # OpenMP reads it when torch loads; idle threads then sleep, not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    declare_missing_ops()
    from peft_zoo.cli import main as run

    return run()
