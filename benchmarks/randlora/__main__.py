"""`python -m benchmarks.randlora`."""

import sys

from benchmarks.randlora.suite import main

sys.exit(main())
