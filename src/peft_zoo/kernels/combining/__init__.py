"""Combinations of several low-rank updates of one weight into one."""
