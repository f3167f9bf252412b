"""Benchmark of watermarks: bit accuracy, false positives, image quality, attacks, cost."""
