"""LQ-LoRA's operators and decompositions beside their peers."""
