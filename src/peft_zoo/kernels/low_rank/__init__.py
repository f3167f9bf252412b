"""Low-rank approximation of factored, dense and quantized matrices."""
