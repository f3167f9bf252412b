"""What the tools for checkpoints share: models without weights, names of tensors, streaming, quantized bases."""
