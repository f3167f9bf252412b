"""Benchmarks of LQ-LoRA's decomposition, budget and operators, compared with other libraries."""
