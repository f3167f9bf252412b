"""Speed and memory of our methods beside their peers, each file one benchmark: `python -m benchmarks.<name>`."""

import os

# torch's profiler reports every start and stop on stderr unless told otherwise; it reads this when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
