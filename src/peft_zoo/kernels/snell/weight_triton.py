"""Triton kernels of SNELL's sparse kernel matrix: its threshold, and its tiles added to a weight or written alone."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from peft_zoo.kernels.base.tiles_triton import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    Factors,
    kernel_tile,
    launch,
    sparse_tile,
)
from peft_zoo.kernels.base.triton_helpers import narrow, widen
from peft_zoo.kernels.snell.weight import with_spec
from peft_zoo.kernels.sparse.threshold import KEEP_ALL
from peft_zoo.kernels.sparse.threshold_triton import MatrixSource, select


def kernelized_threshold(*args: Any) -> Tensor:
    """Launches the kernels of `weight.threshold`."""
    A, B, kernel_params, num_kept, last, spec = with_spec(args)
    if spec.sparsify == "none":
        return A.new_full((), KEEP_ALL)
    return select(MatrixSource(Factors(A, B, kernel_params, spec)), num_kept, last)


def kernelized_merge(*args: Any) -> tuple[Tensor, Tensor]:
    """Launches the kernel of `weight.merge_operator`."""
    A, B, kernel_params, num_kept, threshold, last, weight, dtype, spec = with_spec(args)
    factors = Factors(A, B, kernel_params, spec)
    source = MatrixSource(factors)
    if threshold is not None:
        threshold = threshold.clone()  # an operator must not return its input
    elif spec.sparsify == "none":
        threshold = A.new_full((), KEEP_ALL)
    else:
        threshold = select(source, num_kept, last)
    merged = A.new_empty(factors.shape, dtype=dtype)
    base = merged if weight is None else weight
    tiles = triton.cdiv(factors.shape[0], BLOCK_ROWS) * triton.cdiv(factors.shape[1], BLOCK_COLUMNS)
    _merge[(tiles,)](
        *source.arguments[:-2],
        *(merged, base, threshold, *base.stride()),
        **launch({**factors.constants, "MODE": factors.mode, "HAS_BASE": weight is not None}),
    )
    return merged, threshold


@triton.jit
def _merge(
    w_ptr,
    x_ptr,
    y_ptr,
    params_ptr,
    lse_ptr,
    scale,
    offset,
    n_rows,
    n_columns,
    merged_ptr,  # (out, in), contiguous
    base_ptr,
    threshold_ptr,
    stride_r,
    stride_c,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    MIX: tl.constexpr,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    MODE: tl.constexpr,
    HAS_BASE: tl.constexpr,
):
    across = tl.cdiv(n_columns, BLOCK_COLUMNS)
    r = (tl.program_id(0) // across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = (tl.program_id(0) % across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    W = kernel_tile(
        *(w_ptr, x_ptr, y_ptr, params_ptr, lse_ptr, scale, offset, r, c, n_rows, n_columns, 0, 0),
        *(KIND, NORM, MIX, GROUPS, RANK),
    )
    S = sparse_tile(W, tl.load(threshold_ptr), MODE)
    inside = (r < n_rows)[:, None] & (c < n_columns)[None, :]
    rows = r.to(tl.int64)[:, None]
    if HAS_BASE:
        S += widen(tl.load(base_ptr + rows * stride_r + c.to(tl.int64)[None, :] * stride_c, mask=inside, other=0.0))
    tl.store(merged_ptr + rows * n_columns + c[None, :], narrow(S, merged_ptr.dtype.element_ty), mask=inside)
