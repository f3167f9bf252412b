"""Exports, requantizes and streams models quantized with LQ-LoRA."""
