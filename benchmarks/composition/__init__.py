"""Benchmarks of composing LoRAs: cost relative to one adapter, and quality by rule."""
