"""Benchmarks of RandLoRA, peft's RandLoRA and LoRA."""
