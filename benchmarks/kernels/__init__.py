"""Speed of every operator on a GPU, or estimates of it."""
