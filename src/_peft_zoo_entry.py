"""The program `peft-zoo`: prepares the process, then hands over to `peft_zoo.cli.main`."""

# A top-level module of its own: what it does must be done before `peft_zoo/__init__.py` imports torch and peft.

from __future__ import annotations

import logging
import os

# Where these are installed, importing peft imports them, and they report at length which optional parts they lack.
TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")


def main() -> int:
    """Run the command line and return its exit status."""
    # OpenMP reads it when torch loads; idle threads then sleep, not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    from peft_zoo.cli.main import main as run

    return run()
