"""Operators for LoRA: adds any number of LoRA updates to a weight in one pass."""
