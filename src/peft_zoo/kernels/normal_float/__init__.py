"""NormalFloat quantization with 2 to 8 bits per weight, and products with quantized matrices."""
