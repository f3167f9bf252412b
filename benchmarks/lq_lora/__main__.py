"""`python -m benchmarks.lq_lora`."""

import sys

from benchmarks.lq_lora.suite import main

sys.exit(main())
