"""Floor 2 of peft-zoo: statistics of a model's inputs, outputs and gradients, collected with hooks."""
