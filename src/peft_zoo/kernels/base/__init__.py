"""What every operator shares: registration with torch, choice of PyTorch or Triton, Triton helpers."""
