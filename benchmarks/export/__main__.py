"""`python -m benchmarks.export`."""

import sys

from benchmarks.export.suite import main

sys.exit(main())
