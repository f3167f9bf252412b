"""Benchmarks of `export_lora` against peft's conversion, and of a real model's export."""
