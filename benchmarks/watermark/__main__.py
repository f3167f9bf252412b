"""Runs `python -m benchmarks.watermark`."""

import sys

from benchmarks.watermark.suite import main

sys.exit(main())
