"""Benchmarks of LoRA-Squeeze against other methods that lower a LoRA's rank."""
