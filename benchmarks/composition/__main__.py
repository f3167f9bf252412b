"""`python -m benchmarks.composition`."""

import sys

from benchmarks.composition.cost import main

sys.exit(main())
