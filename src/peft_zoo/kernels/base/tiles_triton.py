"""Tiles of SNELL's kernel matrix inside Triton kernels, and the softmax denominators of `mix_k`.

Every kernel that needs the matrix computes its tiles with `kernel_tile`. One thread computes an entry, by the same
sequence of operations in every kernel, for any shape of the tile and either factor along its rows: the bits are equal
in all passes, so the number of entries above a threshold is exact.

Distances are sums of squared differences in float32, which keeps the digits of small distances; nothing goes through
TF32. The factors are stored as `(G, r/G, features)`, so that neighbouring threads read neighbouring values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_zoo.kernels.base.kernel_spec import SPARSIFY, KernelSpec
from peft_zoo.kernels.base.triton_helpers import widen

# Kinds of a tile's entries, and modes of their sparsification. Kernels can only read globals that are `constexpr`.
GIVEN, DISTANCE, RBF, LINEAR, SIGMOID = map(tl.constexpr, range(5))
NONE, SIGNED_SQUARE, PRODUCT, HARD, SOFT = map(tl.constexpr, range(5))
_KINDS = {"piecewise_linear": 1, "mix_k": 1, "rbf": 2, "linear": 3, "sigmoid": 4}

BLOCK_ROWS, BLOCK_COLUMNS, NUM_WARPS = 32, 128, 4
PROGRAMS = 1024
"""Programs of a reduction that may be split: eight for each multiprocessor of an H100. A constant, so that sums are
added in the same order on every GPU."""


@dataclass
class Factors:
    """Factors A `(G, in, r/G)` and B `(G, out, r/G)` of a kernel matrix, float32, as arguments of Triton kernels."""

    A: Tensor
    B: Tensor
    kernel_params: Tensor | None
    spec: KernelSpec

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(out, in)` of the transposed kernel matrix, as of a weight."""
        return self.B.shape[1], self.A.shape[1]

    @cached_property
    def scaled(self) -> tuple[Tensor, Tensor]:
        """A and B after `KernelSpec.scaled_factors`."""
        return self.spec.scaled_factors(self.A, self.B)

    @cached_property
    def columns(self) -> tuple[Tensor, Tensor]:
        """Scaled A and B as `(G, r/G, features)`."""
        A, B = self.scaled
        return A.mT.contiguous(), B.mT.contiguous()

    @cached_property
    def params(self) -> Tensor:
        """`[alpha, gamma, beta]` of shape `(3,)`."""
        return torch.stack(self.spec.params(self.kernel_params, self.A))

    @cached_property
    def lse(self) -> Tensor:
        """`log sum_j exp(K_ij / gamma)` of each input feature, `(in,)`, for `mix_k`; unused by other kernels."""
        if self.spec.kernel != "mix_k":
            return self.params
        n_out, n_in = self.shape
        grid, tiles_per_split = split_grid(n_in, n_out, self.constants)
        partial = self.A.new_empty(grid[1], n_in)
        _log_sum_exp[grid](
            *(partial, *self.columns, self.params, n_in, n_out, tiles_per_split), **launch(self.constants)
        )
        return torch.logsumexp(partial, 0)

    @property
    def scalars(self) -> tuple[float, float]:
        """Scale of the groups and sum of their coefficients."""
        return self.spec.scale, self.spec.coefficient_sum(len(self.A))

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of the kernels."""
        spec = self.spec
        return constants(_KINDS[spec.kernel], spec.norm, spec.kernel == "mix_k", len(self.A), self.A.shape[2])

    @property
    def mode(self) -> int:
        """Value of `sparsify` for the compile-time argument `MODE`."""
        return SPARSIFY.index(self.spec.sparsify)


def constants(kind: int, norm: int = 2, mix: bool = False, groups: int = 2, rank: int = 8) -> dict[str, Any]:
    """Compile-time arguments that every kernel over the matrix shares; `rank` is r/G."""
    blocks = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
    return {"KIND": kind, "NORM": norm, "MIX": mix, "GROUPS": groups, "RANK": rank} | blocks


def launch(constants: dict[str, Any], num_warps: int = NUM_WARPS) -> dict[str, Any]:
    """Constants and launch options as keyword arguments of a launch."""
    return {**constants, "num_warps": num_warps, "enable_fp_fusion": False}


def split_grid(rows: int, columns: int, constants: dict[str, Any]) -> tuple[tuple[int, int], int]:
    """Returns the grid of a reduction over columns, blocks of rows by parts of the columns, and the tiles of a part."""
    blocks, tiles = triton.cdiv(rows, constants["BLOCK_ROWS"]), triton.cdiv(columns, constants["BLOCK_COLUMNS"])
    parts = max(1, min(PROGRAMS // blocks, tiles))
    return (blocks, parts), triton.cdiv(tiles, parts)


@triton.jit
def pair_tile(
    x_ptr, y_ptr, params_ptr, r, c, n_rows, n_columns, g, KIND: tl.constexpr, NORM: tl.constexpr, RANK: tl.constexpr
):
    """Computes the distance, product, exponential or sigmoid of group `g`, `(rows, columns)`, before `combine`."""
    total = (r[:, None] * 0 + c[None, :] * 0).to(tl.float32)
    for k in range(RANK):
        x, y = coordinates(x_ptr, y_ptr, r, c, n_rows, n_columns, g * RANK + k)
        if KIND == LINEAR or KIND == SIGMOID:
            total = tl.fma(x, y, total)
        elif NORM == 1:
            total += tl.abs(x - y)
        else:
            total = tl.fma(x - y, x - y, total)
    if KIND == DISTANCE and NORM == 2:
        total = tl.sqrt(total)
    elif KIND == RBF:
        total = tl.exp(-tl.load(params_ptr + 2) * total)
    elif KIND == SIGMOID:
        total = 1 / (1 + tl.exp(-tl.load(params_ptr + 2) * total))
    return total


@triton.jit
def coordinates(x_ptr, y_ptr, r, c, n_rows, n_columns, k):
    """Loads coordinate `k` of every row's and every column's point, both broadcast to the tile."""
    x = tl.load(x_ptr + k * n_rows + r, mask=r < n_rows, other=0.0)
    y = tl.load(y_ptr + k * n_columns + c, mask=c < n_columns, other=0.0)
    return tl.broadcast(x[:, None], y[None, :])


@triton.jit
def pair_tiles(
    x_ptr,
    y_ptr,
    params_ptr,
    r,
    c,
    n_rows,
    n_columns,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
):
    """Computes `pair_tile` of every group, as a tuple."""
    pairs = (pair_tile(x_ptr, y_ptr, params_ptr, r, c, n_rows, n_columns, 0, KIND, NORM, RANK),)
    for g in tl.static_range(1, GROUPS):
        pairs += (pair_tile(x_ptr, y_ptr, params_ptr, r, c, n_rows, n_columns, g, KIND, NORM, RANK),)  # type: ignore[assignment]
    return pairs


@triton.jit
def combine(pairs, params_ptr, scale, offset, KIND: tl.constexpr, GROUPS: tl.constexpr):
    """Computes the signed sum of the groups: the kernel matrix, or K of `mix_k`."""
    total = pairs[0]
    for g in tl.static_range(1, GROUPS):
        if g % 2 == 1:
            total -= pairs[g]
        else:
            total += pairs[g]
    if KIND == RBF or KIND == SIGMOID:
        outer = tl.broadcast_to(tl.load(params_ptr) * scale, total.shape)
        total = tl.fma(total, outer, tl.broadcast_to(tl.load(params_ptr + 1) * offset, total.shape))
    return total


@triton.jit
def softmax_tile(K, params_ptr, lse_ptr, r, c, n_rows, n_columns, ROWS_ARE_INPUTS: tl.constexpr):
    """Computes the softmax of `K / gamma` over the outputs; 0 outside of the matrix."""
    inside = (r < n_rows)[:, None] & (c < n_columns)[None, :]
    if ROWS_ARE_INPUTS:
        lse = tl.load(lse_ptr + r, mask=r < n_rows, other=0.0)[:, None]
    else:
        lse = tl.load(lse_ptr + c, mask=c < n_columns, other=0.0)[None, :]
    return tl.where(inside, tl.exp(K / tl.load(params_ptr + 1) - lse), 0.0)


@triton.jit
def mix(K, P, params_ptr):
    """Computes W = K + alpha P + beta."""
    return tl.fma(P, tl.broadcast_to(tl.load(params_ptr), P.shape), K) + tl.load(params_ptr + 2)


@triton.jit
def kernel_tile(
    w_ptr,  # the matrix itself for KIND = GIVEN, else unused; the factors are unused for GIVEN
    x_ptr,
    y_ptr,
    params_ptr,
    lse_ptr,
    scale,
    offset,
    r,
    c,
    n_rows,
    n_columns,
    stride_r,
    stride_c,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    MIX: tl.constexpr,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
):
    """Computes or loads a tile of the matrix (outputs, inputs) in float32; undefined outside of the matrix."""
    if KIND == GIVEN:
        at = w_ptr + r.to(tl.int64)[:, None] * stride_r + c.to(tl.int64)[None, :] * stride_c
        return widen(tl.load(at, mask=(r < n_rows)[:, None] & (c < n_columns)[None, :], other=0.0))
    pairs = pair_tiles(x_ptr, y_ptr, params_ptr, r, c, n_rows, n_columns, KIND, NORM, GROUPS, RANK)
    W = combine(pairs, params_ptr, scale, offset, KIND, GROUPS)
    if MIX:
        W = mix(W, softmax_tile(W, params_ptr, lse_ptr, r, c, n_rows, n_columns, False), params_ptr)
    return W


@triton.jit
def multiplier_tile(W, threshold, MODE: tl.constexpr):
    """Computes dS/dW of `snell.matrix.sparsify`; except for `soft` this is also S / W."""
    if MODE == NONE:
        return tl.full(W.shape, 1.0, tl.float32)
    size = tl.abs(W)
    if MODE == PRODUCT:
        return tl.maximum(size - tl.maximum(threshold, 0.0), 0.0)
    if MODE == SIGNED_SQUARE:
        return tl.where(size > threshold, size, 0.0)
    return tl.where(size > threshold, 1.0, 0.0)


@triton.jit
def sparse_tile(W, threshold, MODE: tl.constexpr):
    """Computes S of `snell.matrix.sparsify`."""
    if MODE == SOFT:
        level = tl.maximum(threshold, 0.0)
        return W - tl.minimum(tl.maximum(W, -level), level)
    return W * multiplier_tile(W, threshold, MODE)


@triton.jit
def _log_sum_exp(
    partial_ptr,  # (splits, in)
    x_ptr,
    y_ptr,
    params_ptr,
    n_rows,
    n_columns,
    tiles_per_split,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    MIX: tl.constexpr,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    first = tl.program_id(1) * tiles_per_split
    for t in range(first, first + tiles_per_split):
        c = t * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        pairs = pair_tiles(x_ptr, y_ptr, params_ptr, r, c, n_rows, n_columns, KIND, NORM, GROUPS, RANK)
        logits = combine(pairs, params_ptr, 1.0, 0.0, KIND, GROUPS) / tl.load(params_ptr + 1)
        logits = tl.where((c < n_columns)[None, :], logits, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)  # all columns so far lie outside
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        top = highest
    tl.store(partial_ptr + tl.program_id(1) * n_rows + r, top + tl.log(total), mask=r < n_rows)
