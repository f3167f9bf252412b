"""Low-rank approximations of factored, dense and implicitly given matrices, and of quantization errors."""
