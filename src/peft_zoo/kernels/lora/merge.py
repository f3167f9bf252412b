r"""Merges any number of LoRA updates into a weight, in one pass over the weight and with one rounding.

Definition, with the right-hand side in at least 32 bits::

    W <- round(W + sum_k s_k B_k A_k)

peft's merge rounds three times (the product, the scaled product, the sum) and moves 12 bytes for each element of a
16-bit weight, 12 k for k adapters; this moves 4 for any k. By the data sheet of an H100 that traffic is the bound up to
a total rank of about 500. cuBLAS's `addmm` moves 4 bytes too, but rounds 16-bit sums more than once: on an H100 its
bfloat16 weight had a relative error of 6.6e-3; one rounding allows 3.9e-3. So it is used only for wider weights and
only if the sum is one product, see `_is_one_product`.

Stochastic rounding (`seed=`) rounds up with the probability that makes the mean exact, so that updates far below the
spacing of a 16-bit weight survive on average. Its random bits are those of `philox` at the element's row and column:
equal on every device and in every memory layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_zoo.kernels.base.operator import FLOATS, PreferTorch, kernels_mode, operator, refuse_dtypes
from peft_zoo.kernels.random_matrix.philox import philox

_SMALLEST_HALF = 0x33800000  # float32 bit pattern of 2^-24, the smallest positive float16
ROUNDING = 2  # third counter word of philox, reserved for rounding

_CHUNK_ELEMENTS = 2**17  # in each of the torch path's 32-bit scratches, which replace a 32-bit copy of the weight
_ALIGNED = 64  # multiple of the tiles of CPU libraries, in rows and columns
_CHUNK_ELEMENTS_CUDA = 2**22  # the same on a GPU, where each block is a few launches


def merge_lora(
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scales: Sequence[float],
    *,
    seed: int | None = None,
    inplace: bool = False,
) -> Tensor:
    """Computes `weight + sum_k scales[k] B[k] A[k]` in 32 bits (64 for a 64-bit weight), rounded once.

    Args:
        weight: Weight of shape `(out, in)`, float16, bfloat16, float32 or float64, any strides; for a `Conv1D`, which
            stores `(in, out)`, pass the transpose.
        A: Factor of shape `(r_k, in)` of each adapter, any floating-point dtype.
        B: Factor of shape `(out, r_k)` of each adapter, any floating-point dtype.
        scales: Finite scale of each adapter, `lora_alpha / r_k` for a LoRA.
        seed: 64-bit integer seed of stochastic rounding; None (default) rounds to the nearest. Ignored for 32- and
            64-bit weights, which are not rounded.
        inplace: Whether to change `weight` and return it; default False.

    Returns:
        Merged weight of the dtype of `weight`; differentiable in `weight`, `A` and `B` unless `inplace` (the gradient
        of rounding is 1).

    Raises:
        ValueError: If the lists of factors differ in length or shapes, a scale is not finite, or a tensor requires a
            gradient with `inplace`; `weight` is unchanged then.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels import merge_lora
        >>> A, B = torch.ones(1, 3), torch.ones(2, 1)  # rank 1
        >>> merge_lora(torch.zeros(2, 3), [A, A], [B, B], scales=[0.5, 2.0])
        tensor([[2.5000, 2.5000, 2.5000],
                [2.5000, 2.5000, 2.5000]])
    """
    _check(weight, A, B, scales, seed)
    arguments = weight, list(A), list(B), [float(s) for s in scales], seed
    if not inplace:
        return _merge(*arguments)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (weight, *A, *B)):
        raise ValueError(
            "inplace=True computes no gradient, but a tensor requires one; use torch.no_grad() or inplace=False."
        )
    _merge_inplace(*arguments)
    return weight


def merge_lora_reference(
    weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scales: Sequence[float], seed: int | None = None
) -> Tensor:
    """Definition of `merge_lora`; arguments as there."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide)
    for a, b, s in zip(A, B, scales, strict=True):
        total = total + s * (b.to(wide) @ a.to(wide))
    if seed is None:
        return total.to(weight.dtype)
    return stochastic_round(total, weight.dtype, seed)


def stochastic_round(values: Tensor, dtype: torch.dtype, seed: int, first: tuple[int, int] = (0, 0)) -> Tensor:
    """Rounds float32 `(m, n)` to neighbours in `dtype`, with probabilities that make the mean exact.

    The random bits follow from `seed` and the indices of the values in the whole matrix, of which `first` are those of
    `values[0, 0]`. Values that are not finite, and all if `dtype` does not have 16 bits, are converted as usual.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return values.to(dtype)
    words = _random_words(seed, values, first)
    bits = values.detach().contiguous().view(torch.int32)
    if dtype == torch.bfloat16:
        # The upper half plus a carry: it comes if the lower half is above 16 of the random bits.
        rounded = ((words >> 8) & 0xFFFF).bitwise_xor_(0xFFFF).add_(bits).bitwise_right_shift_(16)
        rounded = rounded.to(torch.int16).view(dtype)
    else:
        rounded = _stochastic_half(values, bits, words & 0xFFFFFF)
    return torch.where(values.isfinite(), rounded, values.to(dtype))


def _random_words(seed: int, values: Tensor, first: tuple[int, int]) -> Tensor:
    """Returns the random 32 bits of each value, int32 of the shape of `values`; four columns share a call of philox."""
    row, column = first
    m, n = values.shape
    quads = torch.arange(column // 4, -(-(column + n) // 4), device=values.device)
    rows = torch.arange(row, row + m, device=values.device)[:, None]
    words = torch.empty(m, len(quads), 4, dtype=torch.int32, device=values.device)
    for k, word in enumerate(philox(seed, quads, rows, ROUNDING)):
        words[..., k] = word
    return words.flatten(1)[:, column % 4 :][:, :n]


def _stochastic_half(values: Tensor, bits: Tensor, random: Tensor) -> Tensor:
    """Rounds to float16 from the values' bits and 24 random bits for each."""
    # Number of the 23 fraction bits that the format lacks; it lacks more below its smallest normal number.
    exponent = (bits >> 23) & 0xFF
    lost = 13 + (113 - exponent).clamp(0, 10)
    unit = torch.ones_like(bits) << lost
    tiny = exponent < 103  # below 2^-24
    chance = torch.where(
        tiny, (torch.where(tiny, values.abs(), 0.0) * 2.0**48).to(torch.int32), (bits & (unit - 1)) << (24 - lost)
    )
    down = torch.where(tiny, bits & -(2**31), bits & ~(unit - 1))
    step = torch.where(tiny, _SMALLEST_HALF, unit)
    return (down + torch.where(random < chance, step, 0)).view(torch.float32).to(torch.float16)


def _check(weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scales: Sequence[float], seed: int | None) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)}; it must be a float matrix (out, in)."
        )
    if not len(A) == len(B) == len(scales):
        raise ValueError(f"A, B and scales have {len(A)}, {len(B)} and {len(scales)} entries; pass one per adapter.")
    for k, (a, b, scale) in enumerate(zip(A, B, scales, strict=True)):
        if a.dim() != 2 or b.dim() != 2 or (b.shape[0], a.shape[1], b.shape[1]) != (*weight.shape, a.shape[0]):
            raise ValueError(
                f"A[{k}] has shape {tuple(a.shape)} and B[{k}] {tuple(b.shape)}; for a weight of shape "
                f"{tuple(weight.shape)} they must be (r, {weight.shape[1]}) and ({weight.shape[0]}, r)."
            )
        if not math.isfinite(scale):
            raise ValueError(f"scales[{k}]={scale} must be finite.")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed} must be an integer of 64 bits.")


_SCHEMA = "weight, Tensor[] A, Tensor[] B, float[] scales, int? seed"


def _refuse(weight: Tensor, A: list[Tensor], B: list[Tensor], *_: Any) -> str | None:
    if not A or 0 in weight.shape:
        return PreferTorch("there is nothing to add")
    return refuse_dtypes(weight, *A, *B, allowed=FLOATS)


def _refuse_inplace(*arguments: Any) -> str | None:
    if kernels_mode() == "auto" and _is_one_product(*arguments):
        return PreferTorch("it is a single addmm")
    return _refuse(*arguments)


@operator(
    "merge_lora",
    f"(Tensor {_SCHEMA}) -> Tensor",
    reference=merge_lora_reference,
    triton="merge_triton",
    refuse=_refuse,
)
def _merge(weight: Tensor, *adapters: Any) -> Tensor:
    merged = torch.empty_like(weight)
    _merge_into(merged, weight, *adapters)
    return merged


@operator(
    "merge_lora_",
    f"(Tensor(a!) {_SCHEMA}) -> ()",
    reference=merge_lora_reference,
    triton="merge_triton",
    refuse=_refuse_inplace,
    mutates=("weight",),
)
def _merge_inplace(weight: Tensor, *adapters: Any) -> None:
    _merge_into(weight, weight, *adapters)


def _merge_into(
    out: Tensor, weight: Tensor, A: list[Tensor], B: list[Tensor], scales: list[float], seed: int | None
) -> None:
    if _is_one_product(weight, A, B, scales, seed):
        torch.addmm(weight, torch.cat(B, 1), torch.cat(A), alpha=scales[0], out=out)
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    A = [a.to(wide) for a in A]
    # Blocks along the dimension of larger stride, so that each is contiguous.
    columns_first = weight.stride(0) < weight.stride(1)
    length, width = weight.shape[::-1] if columns_first else weight.shape
    blocks = _blocks(length, (_CHUNK_ELEMENTS_CUDA if weight.is_cuda else _CHUNK_ELEMENTS) // max(1, width))
    largest = max((block.stop - block.start for block in blocks), default=0)
    scratch = torch.empty(2, largest * width, dtype=wide, device=weight.device)
    for block in blocks:
        i, j = (slice(None), block) if columns_first else (block, slice(None))
        shape = (width, block.stop - block.start) if columns_first else (block.stop - block.start, width)
        total, update = (part[: math.prod(shape)].view(shape) for part in scratch)
        total.copy_(weight[i, j])
        for a, b, scale in zip(A, B, scales, strict=True):
            # Not addmm: its sums differ from the definition's, which are peft's too, in the last bit.
            total += torch.mm(b[i].to(wide), a[:, j], out=update).mul_(scale)
        if seed is None:
            out[i, j] = total
            continue
        out[i, j] = stochastic_round(total, out.dtype, seed, (0, block.start) if columns_first else (block.start, 0))


def _blocks(length: int, wanted: int) -> list[slice]:
    """Splits rows or columns into blocks of about `wanted`.

    BLAS sums each element of a product as in the whole product if no block is narrow and all begin at multiples of its
    tiles: so blocks are multiples of `_ALIGNED`, and the last one takes what would be left.
    """
    step = max(_ALIGNED, wanted // _ALIGNED * _ALIGNED)
    starts = list(range(0, max(1, length - step + 1), step))
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], length], strict=True)]


def _is_one_product(weight: Tensor, A: list[Tensor], B: list[Tensor], scales: list[float], seed: int | None) -> bool:
    """Whether one `addmm` on a GPU computes the definition: one dtype, one scale, sums of at least 32 bits."""
    if not A or seed is not None or len(set(scales)) > 1 or any(t.dtype != weight.dtype for t in (*A, *B)):
        return False
    if (
        not weight.is_cuda or weight.dtype.itemsize < 4
    ):  # a library may add 16-bit products in 16 bits, or round them before the sum
        return False
    return torch.get_float32_matmul_precision() == "highest"


@_merge.register_fake
def _(weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight)


@_merge_inplace.register_fake
def _(*_: Any) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, A, B, ctx.scales, _ = inputs
    ctx.adapters = len(A)
    ctx.save_for_backward(*A, *B)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    A, B = ctx.saved_tensors[: ctx.adapters], ctx.saved_tensors[ctx.adapters :]
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    dA = [(s * (b.to(wide.dtype).mT @ wide)).to(a.dtype) for a, b, s in zip(A, B, ctx.scales, strict=True)]
    dB = [(s * (wide @ a.to(wide.dtype).mT)).to(b.dtype) for a, b, s in zip(A, B, ctx.scales, strict=True)]
    return grad, dA, dB, None, None


_merge.register_autograd(_backward, setup_context=_save)
