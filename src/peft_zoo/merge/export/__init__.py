"""Writes any adapter as a plain LoRA of peft: exactly, or as its best approximation with a certified error."""
