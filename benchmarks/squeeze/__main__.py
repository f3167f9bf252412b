"""`python -m benchmarks.squeeze`."""

import sys

from benchmarks.squeeze.suite import main

sys.exit(main())
