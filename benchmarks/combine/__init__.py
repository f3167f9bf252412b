"""Benchmarks of `combine` against peft's `add_weighted_adapter`."""
