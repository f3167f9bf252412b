"""Triton kernels of `scaled_basis`: M exists one tile at a time, in registers, and its gradient likewise."""

# mypy: disable-error-code="no-untyped-def"
# The arguments of a `triton.jit` function have no Python types.

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_zoo.kernels.base.triton_helpers import POINTERS, CompileSpec, dot16, dot_like, load_tile, store_tile, widen
from peft_zoo.kernels.random_matrix.basis_triton import read_basis

BLOCK_T, NUM_WARPS = 64, 4
"""Tokens of a program of the products; not tuned on a GPU yet."""
BLOCK_J, BLOCK_C = 32, 64
"""Bases and features of a program of the gradient."""


def scaled_basis_product(
    x: Tensor, A: Tensor, lambda_: Tensor, gamma: Tensor, scale: float, k: int, onto_columns: bool, chunk: int
) -> Tensor:
    """`scaled_basis.scaled_basis_product`; no piece of M is in memory, so `chunk` has no meaning."""
    (_, n), d = lambda_.shape, gamma.shape[1]
    x = x.contiguous()
    out = x.new_empty(len(x), d if onto_columns else lambda_.numel())
    constants = _product_constants(x.dtype, k, onto_columns)
    grid = (triton.cdiv(len(x), BLOCK_T) * triton.cdiv(out.shape[1], constants["BLOCK_O"]),)
    _product[grid](
        *(out, x, A, lambda_.contiguous(), gamma.contiguous()),
        *(len(x), x.shape[1], out.shape[1], n, A.stride(0), scale),
        **constants,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return out


def scaled_basis_grad(
    u: Tensor, v: Tensor, A: Tensor, lambda_: Tensor, gamma: Tensor, scale: float, k: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """`scaled_basis.scaled_basis_grad`. The sums over features are added up block by block, in a fixed order."""
    (r, n), d = lambda_.shape, gamma.shape[1]
    blocks = triton.cdiv(d, BLOCK_C)
    parts, dgamma = lambda_.new_empty(blocks, r, n), torch.empty_like(gamma, memory_format=torch.contiguous_format)
    _grad[(triton.cdiv(n, BLOCK_J), blocks)](
        *(parts, dgamma, u.contiguous(), v.contiguous(), A, lambda_.contiguous(), gamma.contiguous()),
        *(len(u), r, n, d, A.stride(0), scale),
        **_grad_constants(u.dtype, k),
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return parts.sum(0), dgamma


def _product_constants(dtype: torch.dtype, k: int, onto_columns: bool) -> dict[str, int]:
    # A 32-bit product takes three parts of either operand, and so smaller tiles.
    outputs, inner = (32, 16) if dtype == torch.float32 else (64, 32)
    return {
        "TERNARY": k > 0,
        "ONTO_COLUMNS": onto_columns,
        "BLOCK_T": BLOCK_T,
        "BLOCK_O": outputs,
        "BLOCK_I": inner,
    }


def _grad_constants(dtype: torch.dtype, k: int) -> dict[str, int]:
    tokens = 16 if dtype == torch.float32 else 32
    return {"TERNARY": k > 0, "BLOCK_T": tokens, "BLOCK_J": BLOCK_J, "BLOCK_C": BLOCK_C}


@triton.jit(do_not_specialize=["scale"])
def _product(
    out_ptr,  # (tokens, outer)
    x_ptr,  # (tokens, inner)
    a_ptr,  # stored
    lambda_ptr,  # (r, n): entry p of it belongs to row p of M
    gamma_ptr,  # (n, d)
    tokens,
    inner,
    outer,
    n,
    a_stride,
    scale,
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
        if ONTO_COLUMNS:
            p, c, pairs, d = i[:, None], o[None, :], inner, outer
        else:
            p, c, pairs, d = o[None, :], i[:, None], outer, inner
        inside = (p < pairs) & (c < d)
        a = read_basis(a_ptr, p // n, c, a_stride, inside, TERNARY)
        g = tl.load(gamma_ptr + (p % n).to(tl.int64) * d + c, mask=inside, other=0.0)
        M = scale * (tl.load(lambda_ptr + p, mask=p < pairs, other=0.0) * (a * widen(g)))
        total += dot_like(x, M, x_ptr.dtype.element_ty)
    store_tile(out_ptr, t, o, tokens, outer, total)


@triton.jit(do_not_specialize=["scale"])
def _grad(
    part_ptr,  # (blocks of c, r, n)
    dgamma_ptr,  # (n, d)
    u_ptr,  # (tokens, r n)
    v_ptr,  # (tokens, d)
    a_ptr,  # stored
    lambda_ptr,  # (r, n)
    gamma_ptr,  # (n, d)
    tokens,
    r,
    n,
    d,
    a_stride,
    scale,
    TERNARY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    j, c = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (j < n)[:, None] & (c < d)[None, :]
    at = j.to(tl.int64)[:, None] * d + c[None, :]
    total = tl.zeros((BLOCK_J, BLOCK_C), tl.float32)
    for k in range(r):
        dM = tl.zeros((BLOCK_J, BLOCK_C), tl.float32)
        for first in range(0, tokens, BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)
            u = tl.load(
                u_ptr + t.to(tl.int64)[None, :] * (r * n) + k * n + j[:, None],
                mask=(j < n)[:, None] & (t < tokens)[None, :],
                other=0.0,
            )
            v = load_tile(v_ptr, t, c, tokens, d)
            if u_ptr.dtype.element_ty == tl.float32:
                dM += tl.dot(u, v, input_precision="tf32x3")
            else:
                dM += dot16(u, v)
        a = read_basis(a_ptr, tl.zeros((1, 1), tl.int32) + k, c[None, :], a_stride, (c < d)[None, :], TERNARY)
        dM *= scale * a
        total += dM * tl.load(lambda_ptr + k * n + j, mask=j < n, other=0.0)[:, None]
        # Read again for each k: kept, it would take the registers of the sums.
        gamma = tl.load(gamma_ptr + at, mask=inside, other=0.0)
        tl.store(part_ptr + (tl.program_id(1) * r + k) * n + j, tl.sum(dM * gamma, axis=1), mask=j < n)
    tl.store(dgamma_ptr + at, total, mask=inside)


def compile_specs() -> Iterator[CompileSpec]:
    """What the compile gate compiles."""
    shared = {"lambda_ptr": "*fp32", "gamma_ptr": "*fp32", "a_stride": "i32", "scale": "fp32"}
    for dtype, k in ((torch.bfloat16, 0), (torch.bfloat16, 43), (torch.float16, 0), (torch.float32, 0)):
        kind = f"{POINTERS[dtype][1:]}, {'ternary' if k else 'uniform'}"
        for onto_columns in (False, True):
            names = dict.fromkeys(("out_ptr", "x_ptr"), POINTERS[dtype]) | {"a_ptr": "*u8"}
            names |= dict.fromkeys(("tokens", "inner", "outer", "n"), "i32")
            yield CompileSpec(
                f"scaled_basis_product[{kind}, {'x M' if onto_columns else 'x M^T'}]",
                _product,
                names | shared,
                _product_constants(dtype, k, onto_columns),
                num_warps=NUM_WARPS,
                has_dot=True,
            )
        names = {"part_ptr": "*fp32", "dgamma_ptr": "*fp32", "a_ptr": "*u8"}
        names |= dict.fromkeys(("u_ptr", "v_ptr"), POINTERS[dtype]) | dict.fromkeys(("tokens", "r", "n", "d"), "i32")
        yield CompileSpec(
            f"scaled_basis_grad[{kind}]",
            _grad,
            names | shared,
            _grad_constants(dtype, k),
            num_warps=NUM_WARPS,
            has_dot=True,
        )
