"""Solvers that divide one budget among many layers: ranks, bits per weight, numbers of nonzero weights."""
