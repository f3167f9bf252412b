"""Operators for LoRA."""
