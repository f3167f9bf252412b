"""Triton kernels of sparse masks: one masks by mask and threshold, one ranks the entries of n:m groups."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_zoo.kernels.base.triton_helpers import narrow, widen

BLOCK, NUM_WARPS = 2048, 4
"""16 elements a thread, which are two loads of 16 bytes of a 16-bit weight; not tuned on a GPU yet."""

BLOCK_M, BLOCK_N = 32, 64
"""Tile for tensors of different layouts, also of 2048 elements: 64 contiguous ones fill cache lines in every dtype."""

BLOCK_ACROSS = 1024
"""Elements for groups along a dimension that is not contiguous: with 2048 some configurations spill registers."""


def mask_weight(
    weight: Tensor, mask: Tensor | None, threshold: Tensor | None, scores: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Launches the kernel of `mask.mask_weight`."""
    out = torch.empty_like(weight, dtype=dtype)
    _launch_select(out, weight, mask, threshold, scores)
    return out


def magnitude_mask(scores: Tensor, threshold: Tensor) -> Tensor:
    """Launches the kernel of `mask.magnitude_mask`."""
    keep = torch.empty_like(scores, dtype=torch.bool)
    _launch_select(keep, scores, None, threshold, None)
    return keep


def n_m_mask(scores: Tensor, n: int, m: int, dim: int) -> Tensor:
    """Launches the kernel of `mask.n_m_mask`."""
    mask = torch.empty_like(scores, dtype=torch.bool)
    # With its dimensions in the order of memory the mask is contiguous: those before `dim` merge, and those after it.
    order = sorted(range(scores.dim()), key=mask.stride, reverse=True)
    position, sizes = order.index(dim % scores.dim()), [scores.shape[d] for d in order]
    shape = math.prod(sizes[:position]), sizes[position], math.prod(sizes[position + 1 :])
    out, source = (t.permute(order).reshape(shape) for t in (mask.view(torch.uint8), scores))
    flat = shape[2] == 1 and source.is_contiguous()
    block = BLOCK if flat else BLOCK_ACROSS
    _rank[(triton.cdiv(scores.numel(), block),)](
        *(out, source, scores.numel() // (1 if flat else m), n, shape[1] // m, shape[2]),
        *(*out.stride(), *source.stride()),
        M=m,
        FLAT=flat,
        BLOCK=block // m,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return mask


def _launch_select(
    out: Tensor, weight: Tensor, mask: Tensor | None, threshold: Tensor | None, scores: Tensor | None
) -> None:
    """Writes the masked weight to `out`, or the mask itself if `out` is bool."""
    tensors = _matrices(out, weight, mask, scores)
    rows, columns = tensors[0].shape
    tile = _tile(rows)
    _select[(triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(columns, tile["BLOCK_N"]),)](
        *(None if t is None else t.view(torch.uint8) if t.dtype == torch.bool else t for t in tensors),
        *(None if threshold is None else threshold.to(torch.float32), rows, columns),
        *(stride for t in tensors for stride in ((0, 0) if t is None else t.stride())),
        **tile,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def _tile(rows: int) -> dict[str, int]:
    return {"BLOCK_M": 1, "BLOCK_N": BLOCK} if rows == 1 else {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}


def _matrices(out: Tensor, *others: Tensor | None) -> list[Any]:
    """Returns all tensors as matrices of one shape; as one row if all have the same memory layout.

    `out` is dense. Matrices of different layouts are read with their strides; tensors of more dimensions in another
    layout than `out` (such as a convolution and its mask) are copied.
    """
    if out.dim() > 2:
        others = tuple(
            t if t is None or t.stride() == out.stride() else torch.empty_like(out, dtype=t.dtype).copy_(t)
            for t in others
        )
    tensors = (out, *others)
    if all(t is None or t.stride() == out.stride() for t in tensors):
        size = out.numel()
        return [None if t is None else t.as_strided((1, size), (size, 1)) for t in tensors]
    if out.dim() < 2:
        return [None if t is None else t.view(1, -1) for t in tensors]
    transposed = out.stride(0) == 1
    return [t.mT if t is not None and transposed else t for t in tensors]


@triton.jit
def _select(
    out_ptr,
    weight_ptr,
    mask_ptr,  # uint8 or None
    score_ptr,  # None: the weight's own magnitudes
    threshold_ptr,  # float32 or None
    rows,
    columns,
    out_stride_m,
    out_stride_n,
    weight_stride_m,
    weight_stride_n,
    mask_stride_m,
    mask_stride_n,
    score_stride_m,
    score_stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid, tiles_n = tl.program_id(0).to(tl.int64), tl.cdiv(columns, BLOCK_N)
    m = ((pid // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    n = ((pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (m < rows) & (n < columns)
    weight = widen(tl.load(weight_ptr + m * weight_stride_m + n * weight_stride_n, mask=inside, other=0.0))
    keep = inside
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + m * mask_stride_m + n * mask_stride_n, mask=inside, other=0) != 0)
    if threshold_ptr is not None:
        score = weight
        if score_ptr is not None:
            score = widen(tl.load(score_ptr + m * score_stride_m + n * score_stride_n, mask=inside, other=0.0))
        keep = keep & (tl.abs(score) > tl.load(threshold_ptr))
    at = out_ptr + m * out_stride_m + n * out_stride_n
    if out_ptr.dtype.element_ty == tl.uint8:
        tl.store(at, keep.to(tl.uint8), mask=inside)
    else:
        tl.store(at, narrow(tl.where(keep, weight, 0.0), out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rank(
    out_ptr,  # uint8 (before, groups_along M, behind)
    score_ptr,
    count,  # of entries if FLAT, else of groups
    kept,
    groups_along,
    behind,
    out_stride_a,
    out_stride_j,
    out_stride_c,
    score_stride_a,
    score_stride_j,
    score_stride_c,
    M: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if FLAT:  # all groups follow each other: loads may be wider than a group
        at = tl.program_id(0).to(tl.int64) * (BLOCK * M) + tl.arange(0, BLOCK * M)
        inside = at < count
        key = tl.reshape(_key(tl.load(score_ptr + at, mask=inside, other=0.0)), (BLOCK, M))
        place = tl.arange(0, M)[None, :]
        rank = tl.zeros((BLOCK, M), tl.int32)
        for i in tl.static_range(M):  # one other entry at a time: comparing all at once takes too many registers
            rank += _comes_before(tl.sum(tl.where(place == i, key, 0.0), axis=1)[:, None], i, key, place)
        tl.store(out_ptr + at, tl.reshape((rank < kept).to(tl.uint8), (BLOCK * M,)), mask=inside)
    else:
        g, place = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None], tl.arange(0, M)[None, :]
        inside = g < count
        a, c = (g // behind // groups_along).to(tl.int64), (g % behind).to(tl.int64)
        j = (g // behind % groups_along).to(tl.int64) * M
        group = score_ptr + a * score_stride_a + j * score_stride_j + c * score_stride_c
        key = _key(tl.load(group + place * score_stride_j, mask=inside, other=0.0))
        rank = tl.zeros((BLOCK, M), tl.int32)
        for i in range(M):  # from the cache: entries of a group are in different threads
            rank += _comes_before(_key(tl.load(group + i * score_stride_j, mask=inside, other=0.0)), i, key, place)
        at = out_ptr + a * out_stride_a + (j + place) * out_stride_j + c * out_stride_c
        tl.store(at, (rank < kept).to(tl.uint8), mask=inside)


@triton.jit
def _key(score):
    """Computes the sort key of entries: the magnitude, and -1 for NaN."""
    magnitude = tl.abs(widen(score))
    return tl.where(magnitude == magnitude, magnitude, -1.0)


@triton.jit
def _comes_before(other, i, key, place):
    """Computes 1 where the entry `other` at index `i` of its group comes before `key` at index `place`, else 0."""
    return ((other > key) | ((other == key) & (i < place))).to(tl.int32)
