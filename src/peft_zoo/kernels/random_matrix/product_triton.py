"""Triton kernel of `basis_product`: a tile of the stored matrix is decoded in the registers that enter the product."""

# mypy: disable-error-code="no-untyped-def"
# The arguments of a `triton.jit` function have no Python types.

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_zoo.kernels.base.triton_helpers import POINTERS, CompileSpec, dot_like, load_tile, store_tile
from peft_zoo.kernels.random_matrix.basis_triton import read_basis

BLOCK_T, BLOCK_O, NUM_WARPS = 64, 64, 4
"""Tokens and features of a program's tile; not tuned on a GPU yet."""


def basis_product(x: Tensor, B: Tensor, k: int, rows: int, columns: int, onto_columns: bool, chunk: int) -> Tensor:
    """`basis_product.basis_product`; nothing is decoded into memory, so `chunk` has no meaning."""
    x = x.contiguous()
    out = x.new_empty(len(x), columns if onto_columns else rows)
    grid = (triton.cdiv(len(x), BLOCK_T) * triton.cdiv(out.shape[1], BLOCK_O),)
    _product[grid](
        *(out, x, B, len(x), x.shape[1], out.shape[1], B.stride(0)),
        **_constants(x.dtype, k, onto_columns),
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return out


def _constants(dtype: torch.dtype, k: int, onto_columns: bool) -> dict[str, int]:
    inner = 16 if dtype == torch.float32 else 32  # a 32-bit product takes three parts of either operand
    return {
        "TERNARY": k > 0,
        "ONTO_COLUMNS": onto_columns,
        "BLOCK_T": BLOCK_T,
        "BLOCK_O": BLOCK_O,
        "BLOCK_I": inner,
    }


@triton.jit
def _product(
    out_ptr,  # (tokens, outer)
    x_ptr,  # (tokens, inner)
    store_ptr,
    tokens,
    inner,
    outer,
    store_stride,
    TERNARY: tl.constexpr,
    ONTO_COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    tiles = tl.cdiv(outer, BLOCK_O)
    t = (tl.program_id(0) // tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = (tl.program_id(0) % tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for first in range(0, inner, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        x = load_tile(x_ptr, t, i, tokens, inner)
        inside = (i < inner)[:, None] & (o < outer)[None, :]
        if ONTO_COLUMNS:
            values = read_basis(store_ptr, i[:, None], o[None, :], store_stride, inside, TERNARY)
        else:
            values = read_basis(store_ptr, o[None, :], i[:, None], store_stride, inside, TERNARY)
        total += dot_like(x, values, x_ptr.dtype.element_ty)
    store_tile(out_ptr, t, o, tokens, outer, total)


def compile_specs() -> Iterator[CompileSpec]:
    """What the compile gate compiles."""
    integers = dict.fromkeys(("tokens", "inner", "outer", "store_stride"), "i32")
    for dtype, k, onto_columns in (
        (torch.bfloat16, 0, False),
        (torch.bfloat16, 0, True),
        (torch.bfloat16, 43, False),
        (torch.bfloat16, 43, True),
        (torch.float16, 0, False),
        (torch.float32, 0, False),
        (torch.float32, 43, True),
    ):
        pointers = dict.fromkeys(("out_ptr", "x_ptr"), POINTERS[dtype]) | {"store_ptr": "*u8"}
        kind, way = "ternary" if k else "uniform", "x B" if onto_columns else "x B^T"
        yield CompileSpec(
            f"basis_product[{POINTERS[dtype][1:]}, {kind}, {way}]",
            _product,
            pointers | integers,
            _constants(dtype, k, onto_columns),
            num_warps=NUM_WARPS,
            has_dot=True,
        )
