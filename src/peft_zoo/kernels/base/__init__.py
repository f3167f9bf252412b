"""Shared by all kernel families: operators and their dispatch, Triton helpers, and SNELL's kernel specification."""
