"""`python -m benchmarks.combine`."""

import sys

from benchmarks.combine.suite import main

sys.exit(main())
