"""All cases of `benchmarks.kernels`, one file for each family of operators."""

from __future__ import annotations

from benchmarks.kernels import lora, normal_float, random_matrix, snell, sparse
from benchmarks.kernels.case import FULL, Case, Sizes


def cases(sizes: Sizes = FULL) -> list[Case]:
    """Returns the cases of every operator at one size."""
    return [case for family in (lora, sparse, snell, random_matrix, normal_float) for case in family.cases(sizes)]
