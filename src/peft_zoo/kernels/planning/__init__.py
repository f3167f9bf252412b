"""Division of one budget among many modules: ranks, bit widths and sparsities."""
