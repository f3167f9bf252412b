"""LoRA-Squeeze for adapter files and models: lowers the rank of a trained LoRA."""
