"""Random matrices computed from a seed, and the products with them that RandLoRA needs."""
