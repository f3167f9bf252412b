"""Merges adapters into checkpoints on disk."""
