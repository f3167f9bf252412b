"""Triton kernels of `kernelized_factor_grad`: the gradient of one factor, and the sums that `mix_k` needs first.

One program computes a block of rows (features of the factor) over a range of columns and keeps its sums in registers;
the ranges are added afterwards, always in the same order. The gradient of the other factor is the same computation with
rows and columns exchanged, because distances and products are symmetric. There are no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_zoo.kernels.base.tiles_triton import (
    DISTANCE,
    LINEAR,
    RBF,
    SIGMOID,
    Factors,
    combine,
    coordinates,
    launch,
    mix,
    multiplier_tile,
    pair_tiles,
    softmax_tile,
    split_grid,
)
from peft_zoo.kernels.base.triton_helpers import widen
from peft_zoo.kernels.snell.tiles import finish_gradients
from peft_zoo.kernels.snell.weight import with_spec

BLOCK_COLUMNS = 16


def block_rows(width: int, is_heavy: bool) -> int:
    """Returns the rows of a tile: the most within the register limit of the compile gate.

    The groups, the matrix, its gradient and the sums are held in registers at once, so tiles are smaller than those of
    the other kernels. `width` is r, padded to a power of two; `mix_k` and `rbf` are heavy.
    """
    return 16 if width > 64 or (width > 32 and is_heavy) else 32 if width > 32 or is_heavy else 64


def kernelized_factor_grad(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the kernels of `weight.factor_grad_operator`."""
    dS, A, B, kernel_params, threshold, spec = with_spec(args)
    factors = Factors(A, B, kernel_params, spec)
    rho = _rho(factors, dS, threshold) if factors.spec.kernel == "mix_k" else factors.params
    raw_A, sums = _gradient(factors, dS.t(), threshold, rho, rows_are_inputs=True)
    raw_B, _ = _gradient(factors, dS, threshold, rho, rows_are_inputs=False)
    alpha, gamma, beta = factors.params
    first, second = sums.sum(1)
    if factors.spec.kernel == "mix_k":
        params = torch.stack([rho.sum(), -alpha / gamma.square() * first, second])
    else:
        params = torch.stack([first, factors.scalars[1] * second, torch.zeros_like(first)])
    dA, dB, dparams = finish_gradients(factors.spec, *factors.scaled, alpha, beta, raw_A, raw_B, params)
    # In the memory layout of the fake tensors, which a traced graph relies on.
    return torch.empty_like(A).copy_(dA), torch.empty_like(B).copy_(dB), dparams


def _gradient(
    factors: Factors, dM: Tensor, threshold: Tensor, rho: Tensor, rows_are_inputs: bool
) -> tuple[Tensor, Tensor]:
    """Returns the unscaled gradient of one factor, `(G, features, r/G)`, and two sums per feature, `(2, features)`.

    `rows_are_inputs` for A; `dM`, the gradient of S, has the features of the factor along its rows. `rho` is that of
    `_rho`, unused unless the kernel is `mix_k`.
    """
    own, other = factors.scaled if rows_are_inputs else factors.scaled[::-1]
    x, y = factors.columns if rows_are_inputs else factors.columns[::-1]
    groups, n_rows, rank = own.shape
    n_columns = other.shape[1]
    chosen = _constants(factors.constants, factors.mode, rows_are_inputs)
    grid, tiles_per_split = split_grid(n_rows, n_columns, chosen)
    flat_own, flat_other = (f.transpose(0, 1).flatten(1).contiguous() for f in (own, other))
    partial = own.new_empty(grid[1], n_rows, groups * rank)
    sums = own.new_empty(grid[1], 2, n_rows)
    _factor_grad[grid](
        *(dM, x, y, factors.params, factors.lse, *factors.scalars, n_rows, n_columns),
        *(flat_own, flat_other, rho, threshold, partial, sums, *dM.stride(), tiles_per_split),
        **launch(chosen),
    )
    return partial.sum(0).view(n_rows, groups, rank).transpose(0, 1), sums.sum(0)


def _constants(shared: dict[str, Any], mode: int, rows_are_inputs: bool) -> dict[str, Any]:
    width = max(16, triton.next_power_of_2(shared["GROUPS"] * shared["RANK"]))
    rows = block_rows(width, shared["MIX"] or shared["KIND"] == RBF.value)
    return {
        **shared,
        "BLOCK_ROWS": rows,
        "BLOCK_COLUMNS": BLOCK_COLUMNS,
        "MODE": mode,
        "WIDTH": width,
        "ROWS_ARE_INPUTS": rows_are_inputs,
    }


@triton.jit
def _factor_grad(
    dm_ptr,
    x_ptr,
    y_ptr,
    params_ptr,
    lse_ptr,
    scale,
    offset,
    n_rows,
    n_columns,
    own_ptr,  # (rows, G r/G)
    other_ptr,  # (columns, G r/G)
    rho_ptr,  # (in,)
    threshold_ptr,
    partial_ptr,  # (splits, rows, G r/G)
    sums_ptr,  # (splits, 2, rows)
    stride_r,
    stride_c,
    tiles_per_split,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    MIX: tl.constexpr,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    MODE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS_ARE_INPUTS: tl.constexpr,
):
    r, w = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, WIDTH)
    own_at = own_ptr + r[:, None] * (GROUPS * RANK) + w[None, :]
    threshold = tl.load(threshold_ptr)
    total = tl.zeros((BLOCK_ROWS, WIDTH), tl.float32)
    first, second = tl.zeros((BLOCK_ROWS,), tl.float32), tl.zeros((BLOCK_ROWS,), tl.float32)
    start = tl.program_id(1) * tiles_per_split
    for t in range(start, start + tiles_per_split):
        c = t * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        inside = (r < n_rows)[:, None] & (c < n_columns)[None, :]
        at = dm_ptr + r.to(tl.int64)[:, None] * stride_r + c.to(tl.int64)[None, :] * stride_c
        dK = widen(tl.load(at, mask=inside, other=0.0))
        pairs = pair_tiles(x_ptr, y_ptr, params_ptr, r, c, n_rows, n_columns, KIND, NORM, GROUPS, RANK)
        K = combine(pairs, params_ptr, scale, offset, KIND, GROUPS)
        if MIX:
            P = softmax_tile(K, params_ptr, lse_ptr, r, c, n_rows, n_columns, ROWS_ARE_INPUTS)
            dK *= multiplier_tile(mix(K, P, params_ptr), threshold, MODE)
            if ROWS_ARE_INPUTS:
                rho = tl.load(rho_ptr + r, mask=r < n_rows, other=0.0)[:, None]
            else:
                rho = tl.load(rho_ptr + c, mask=c < n_columns, other=0.0)[None, :]
            inner = P * (dK - rho)
            first += tl.sum(inner * K, 1)
            second += tl.sum(dK, 1)
            dK += inner * (tl.load(params_ptr) / tl.load(params_ptr + 1))
        else:
            dK *= multiplier_tile(K, threshold, MODE)
            if KIND == RBF or KIND == SIGMOID:
                second += tl.sum(dK, 1)
        for g in tl.static_range(GROUPS):
            dG = -dK if g % 2 == 1 else dK
            if NORM == 1:
                total = _add_signs(total, dG, x_ptr, y_ptr, r, c, n_rows, n_columns, w, g, RANK)
            else:
                if KIND == RBF or KIND == SIGMOID:
                    first += tl.sum(dG * pairs[g], 1)
                columns = ((w >= g * RANK) & (w < (g + 1) * RANK))[None, :]
                own_mask, other_mask = columns & (r < n_rows)[:, None], columns & (c < n_columns)[:, None]
                other_at = other_ptr + c[:, None] * (GROUPS * RANK) + w[None, :]
                R = slope_tile(pairs[g], dG, KIND)
                total = _add_products(total, R, own_at, own_mask, other_at, other_mask, KIND)
    rows = tl.program_id(1) * n_rows + r
    keep = (r < n_rows)[:, None] & (w < GROUPS * RANK)[None, :]
    tl.store(partial_ptr + rows.to(tl.int64)[:, None] * (GROUPS * RANK) + w[None, :], total, mask=keep)
    tl.store(sums_ptr + (2 * tl.program_id(1)) * n_rows + r, first, mask=r < n_rows)
    tl.store(sums_ptr + (2 * tl.program_id(1) + 1) * n_rows + r, second, mask=r < n_rows)


@triton.jit
def _add_products(total, R, own_at, own_mask, other_at, other_mask, KIND: tl.constexpr):
    """Adds the sums of one group: `own * rowsum(R) - R @ other` for differences, `R @ other` for products."""
    other = tl.load(other_at, mask=other_mask, other=0.0)
    if KIND == DISTANCE or KIND == RBF:
        total = tl.dot(-R, other, acc=total, input_precision="tf32x3")
        own = tl.load(own_at, mask=own_mask, other=0.0)
        return tl.fma(own, tl.broadcast_to(tl.sum(R, 1)[:, None], own.shape), total)
    return tl.dot(R, other, acc=total, input_precision="tf32x3")


@triton.jit
def _add_signs(total, dK, x_ptr, y_ptr, r, c, n_rows, n_columns, w, g: tl.constexpr, RANK: tl.constexpr):
    """Adds the sums of one group for norm 1, one coordinate at a time."""
    for k in range(RANK):
        x, y = coordinates(x_ptr, y_ptr, r, c, n_rows, n_columns, g * RANK + k)
        slope = tl.where(x > y, dK, tl.where(x < y, -dK, 0.0))
        total += tl.where((w == g * RANK + k)[None, :], tl.sum(slope, 1)[:, None], 0.0)
    return total


@triton.jit
def slope_tile(pair, dK, KIND: tl.constexpr):
    """Computes R of one group: dK times the slope of its kernel, without the factors that `finish_gradients` adds."""
    if KIND == LINEAR:
        return dK
    if KIND == RBF:
        return pair * dK
    if KIND == SIGMOID:
        return pair * (1 - pair) * dK
    return dK / tl.where(pair > 0, pair, float("inf"))  # the gradient of a distance of 0 is defined as 0


def _rho(factors: Factors, dS: Tensor, threshold: Tensor) -> Tensor:
    """Returns `sum_j dW_ij P_ij` of each input feature, shape `(in,)`; `dS` is `(out, in)`."""
    (n_out, n_in), chosen = factors.shape, _row_constants(factors.constants, factors.mode)
    grid, tiles_per_split = split_grid(n_in, n_out, chosen)
    partial = factors.A.new_empty(grid[1], n_in)
    _row_products[grid](
        *(dS, *factors.columns, factors.params, factors.lse, *factors.scalars, n_in, n_out),
        *(threshold, partial, *dS.stride()[::-1], tiles_per_split),
        **launch(chosen),
    )
    return partial.sum(0)


def _row_constants(shared: dict[str, Any], mode: int) -> dict[str, Any]:
    return {**shared, "BLOCK_COLUMNS": 4 * BLOCK_COLUMNS, "MODE": mode}


@triton.jit
def _row_products(
    dm_ptr,
    x_ptr,
    y_ptr,
    params_ptr,
    lse_ptr,
    scale,
    offset,
    n_rows,
    n_columns,
    threshold_ptr,
    partial_ptr,  # (splits, in)
    stride_r,
    stride_c,
    tiles_per_split,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    MIX: tl.constexpr,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    MODE: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    start = tl.program_id(1) * tiles_per_split
    for t in range(start, start + tiles_per_split):
        c = t * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        at = dm_ptr + r.to(tl.int64)[:, None] * stride_r + c.to(tl.int64)[None, :] * stride_c
        dM = widen(tl.load(at, mask=(r < n_rows)[:, None] & (c < n_columns)[None, :], other=0.0))
        pairs = pair_tiles(x_ptr, y_ptr, params_ptr, r, c, n_rows, n_columns, KIND, NORM, GROUPS, RANK)
        K = combine(pairs, params_ptr, scale, offset, KIND, GROUPS)
        P = softmax_tile(K, params_ptr, lse_ptr, r, c, n_rows, n_columns, True)
        total += tl.sum(dM * multiplier_tile(mix(K, P, params_ptr), tl.load(threshold_ptr), MODE) * P, 1)
    tl.store(partial_ptr + tl.program_id(1) * n_rows + r, total, mask=r < n_rows)
