"""NormalFloat quantization of matrices, and linear layers with quantized weights."""
