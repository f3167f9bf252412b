"""Combines several LoRAs into one, from their files and without the base model."""
