"""Operators for SNELL: the kernel matrix of two factors, computed in tiles, sparsified, merged or applied."""
