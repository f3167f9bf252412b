"""LoRA-Squeeze for adapter files and models: lowers the ranks of a trained LoRA."""
