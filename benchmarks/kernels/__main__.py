"""`python -m benchmarks.kernels`."""

import sys

from benchmarks.kernels.suite import main

sys.exit(main())
