"""Triton kernel of `kernelized_merge`: tiles of the sparse kernel matrix, added to a weight or written alone."""

# mypy: disable-error-code="no-untyped-def"
# The arguments of a `triton.jit` function have no Python types.

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_zoo.kernels.base.triton_helpers import POINTERS, Shipped, narrow, widen
from peft_zoo.kernels.snell.matrix import KernelSpec
from peft_zoo.kernels.snell.tiles_triton import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    Factors,
    constants,
    factor_signature,
    kernel_tile,
    launch,
    sparse_tile,
    variants,
)
from peft_zoo.kernels.sparse.threshold import KEEP_ALL
from peft_zoo.kernels.sparse.threshold_triton import Source, select


def kernelized_merge(
    A: Tensor,
    B: Tensor,
    kernel_params: Tensor | None,
    num_kept: Tensor,
    threshold: Tensor | None,
    last: Tensor | None,
    weight: Tensor | None,
    dtype: torch.dtype | None,
    *spec: Any,
) -> tuple[Tensor, Tensor]:
    """`kernelized_merge.kernelized_merge`, and the threshold."""
    factors = Factors(A, B, kernel_params, KernelSpec(*spec))
    source = Source(None, factors)
    if threshold is not None:
        threshold = threshold.clone()  # an operator must not return its input
    elif factors.spec.sparsify == "none":
        threshold = A.new_full((), KEEP_ALL)
    else:
        threshold = select(source, num_kept, last)
    merged = A.new_empty(factors.shape, dtype=dtype)
    base = merged if weight is None else weight
    tiles = triton.cdiv(factors.shape[0], BLOCK_ROWS) * triton.cdiv(factors.shape[1], BLOCK_COLUMNS)
    _merge[(tiles,)](
        *source.arguments[:-2],
        *(merged, base, threshold, *base.stride()),
        **launch(_constants(factors.constants, factors.mode, weight is not None)),
    )
    return merged, threshold


def _constants(shared: dict[str, Any], mode: int, has_base: bool) -> dict[str, Any]:
    return {**shared, "MODE": mode, "HAS_BASE": has_base}


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


def shipped() -> Iterator[Shipped]:
    """What the compile gate compiles: every kernel with the default gate, every gate with the default kernel."""
    plain = constants(1)
    cases = [(name, torch.bfloat16, chosen, 1, True) for name, chosen in variants()]
    cases += [("sparsify none", torch.bfloat16, plain, 0, True), ("product", torch.bfloat16, plain, 2, True)]
    cases += [("hard", torch.bfloat16, plain, 3, True), ("soft", torch.bfloat16, plain, 4, True)]
    cases += [("alone", torch.bfloat16, plain, 1, False), ("float16", torch.float16, plain, 1, True)]
    cases += [("float32", torch.float32, plain, 1, True), ("r=8", torch.bfloat16, constants(1, rank=4), 1, True)]
    cases += [("r=128", torch.bfloat16, constants(1, rank=64), 1, True)]
    for name, dtype, shared, mode, has_base in cases:
        pointers = dict.fromkeys(("merged_ptr", "base_ptr"), POINTERS[dtype]) | {"threshold_ptr": "*fp32"}
        signature = factor_signature("w_ptr") | pointers | dict.fromkeys(("stride_r", "stride_c"), "i32")
        chosen = _constants(shared, mode, has_base)
        yield Shipped(f"kernelized_merge[{name}]", _merge, signature, chosen, unit_strides=("stride_c",))
