"""Entry point of the program `peft-zoo`; prepares the process and runs `peft_zoo.cli.main`.

A top-level module, because the process must be prepared before `peft_zoo` imports torch and peft.
"""

from __future__ import annotations

import logging
import os
import sys

# Packages that peft imports where they are installed, and that log at length which optional parts they lack.
TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")
_running = False


def main() -> int:
    """Runs the command line and returns its exit status."""
    global _running
    _running = True
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: idle threads sleep instead of spinning
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    from peft_zoo.cli.main import main as run

    return run()


def is_command_line() -> bool:
    """Whether this process runs `peft-zoo` or `python -m peft_zoo`.

    There, `import peft_zoo` registers no methods, which would import torch; a command registers them before it works.
    """
    # Python sets argv[0] to "-m" while it looks for the module to run, which imports the package `peft_zoo`.
    return _running or (sys.argv[:1] == ["-m"] and "peft_zoo" in sys.orig_argv)
