"""Runs the command line as `python -m peft_zoo`."""

from __future__ import annotations

import sys

from _peft_zoo_entry import main

if __name__ == "__main__":
    sys.exit(main())
