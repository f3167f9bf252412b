"""`python -m benchmarks.compile_gate`."""

import sys

from benchmarks.compile_gate.gate import main

if __name__ == "__main__":  # processes that compile import this file again
    sys.exit(main())
