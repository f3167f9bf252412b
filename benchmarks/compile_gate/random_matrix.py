"""Configurations of the kernel that draws random matrices."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.compile_gate.spec import CompileSpec
from peft_zoo.kernels.random_matrix.basis_triton import BLOCK_M, BLOCK_N, NUM_WARPS, _fill


def compile_specs() -> Iterator[CompileSpec]:
    """Yields all configurations."""
    signature = {"store_ptr": "*u8", "seed": "i64"}
    signature |= dict.fromkeys(("rows", "columns", "matrix", "k", "first_row"), "i32")
    for ternary in (False, True):
        yield CompileSpec(
            f"fill_basis[{'ternary' if ternary else 'uniform'}]",
            _fill,
            signature,
            {"TERNARY": ternary, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N},
            num_warps=NUM_WARPS,
            loads_matrix=False,
        )
