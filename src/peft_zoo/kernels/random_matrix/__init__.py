"""Random matrices that are a function of a seed, and products with them."""
