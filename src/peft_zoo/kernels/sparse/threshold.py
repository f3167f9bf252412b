"""Exact k-th smallest magnitude of a matrix in memory, or of one that is computed tile by tile.

Non-negative IEEE floats are ordered like their bit patterns read as integers, so the k-th smallest magnitude is found
digit by digit (radix selection): a histogram of the leading digit of every pattern gives the bin that holds rank k, a
histogram of the next digit is over the members of that bin only, and so on. float32 takes 2 passes, float64 4. Nothing
is sorted, counts are ``int64`` (exact for any size), and on an accelerator no value is copied to the host.

Definition, for ``w`` flattened to ``N`` values of which ``n`` are kept::

    threshold = sort(|w|)[N - n - 1]        so that |w| > threshold keeps n values if no two of them tie

with two limits: ``n >= N`` gives ``-1`` (below every magnitude: all are kept) and ``n <= 0`` the largest magnitude
(none is kept). Values that tie at the threshold are all dropped: fewer than ``n`` may be kept, but never more. NaN
counts as larger than infinity, as in ``torch.sort``, but ``|NaN| > threshold`` is false: each NaN reduces the number of
kept values by one.

A warm start searches near the threshold of the previous step: one pass counts the entries below a narrow range of bit
patterns around it and the entries at each pattern inside. If rank k falls inside, the threshold is found, with the same
exactness; else the selection starts from scratch. Only the Triton kernels warm-start: on a CPU a pass of comparisons
costs about as much as one that counts digits, and a miss would cost both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import Tensor

from peft_zoo.kernels.base.operator import FLOATS, operator, refuse_dtypes

KEEP_ALL = -1.0
"""Threshold below every magnitude, which keeps all entries."""

WARM_BITS = 17
"""A warm start searches 2^17 bit patterns of float32: magnitudes within 0.8 % of the last threshold."""

WARM_ELEMENTS = 2**22
"""Smallest matrix for which the GPU warm-starts. A warm start saves two passes and costs some launches, which may take
longer than the passes over a smaller matrix. On an H100, at 2^24 elements: 0.93 ms instead of 1.14, most of it
launches; smaller matrices were not measured."""

_DIGIT_BITS = 16
_TILE_ELEMENTS = 2**19
_PATTERNS = {torch.float32: (torch.int32, 31), torch.float64: (torch.int64, 63)}


def magnitude_threshold(w: Tensor, num_kept: Tensor, last: Tensor | None = None) -> Tensor:
    """Finds the magnitude above which exactly ``num_kept`` entries of ``w`` lie (fewer if entries tie).

    Args:
        w: Tensor of any shape and strides, with at least one element; float16, bfloat16, float32 or float64.
        num_kept: Number of entries to keep, int64 of shape `()` on the device of `w`; on a GPU never read on the host.
        last: Threshold of a similar matrix, such as the same weight in the previous step, float32 of shape `()`. It is
            the start of the search; the result does not depend on it.

    Returns:
        Threshold of shape `()`, float32 (float64 for float64 `w`); not differentiable.

    Raises:
        ValueError: If `w` has no element or another dtype.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels import magnitude_threshold
        >>> w = torch.tensor([0.1, -3.0, 2.0, 0.5])
        >>> magnitude_threshold(w, torch.tensor(2))  # |w| > 0.5 keeps two entries
        tensor(0.5000)
    """
    if w.numel() == 0:
        raise ValueError(f"w has shape {tuple(w.shape)}; magnitude_threshold needs at least one element.")
    if w.dtype not in (*_PATTERNS, torch.float16, torch.bfloat16):
        raise ValueError(f"w is {w.dtype}; magnitude_threshold needs a floating-point matrix, so cast it first.")
    return _of_matrix(w.detach(), num_kept, last)


def magnitude_threshold_reference(w: Tensor, num_kept: Tensor | int, last: Tensor | None = None) -> Tensor:
    """Definition of `magnitude_threshold`: an entry of the sorted magnitudes; arguments and result as there."""
    wide = w.to(torch.promote_types(w.dtype, torch.float32))
    rank = w.numel() - int(num_kept)
    if rank <= 0:
        return wide.new_tensor(KEEP_ALL)
    return wide.abs().flatten().sort().values[min(rank, w.numel()) - 1]


@operator(
    "magnitude_threshold",
    "(Tensor w, Tensor num_kept, Tensor? last) -> Tensor",
    reference=magnitude_threshold_reference,
    triton="threshold_triton",
    refuse=lambda w, *_: refuse_dtypes(w, allowed=FLOATS),
)
def _of_matrix(w: Tensor, num_kept: Tensor, last: Tensor | None) -> Tensor:
    """Selects the threshold in PyTorch, in tiles of rows."""
    wide = torch.promote_types(w.dtype, torch.float32)
    rows = w.reshape(-1, w.shape[-1]) if w.dim() else w.reshape(1, 1)
    parts = rows.split(max(1, _TILE_ELEMENTS // rows.shape[1]))
    return tiled_threshold(lambda: (part.to(wide) for part in parts), w.numel(), num_kept)


@_of_matrix.register_fake
def _(w: Tensor, *_: object) -> Tensor:
    return w.new_empty((), dtype=torch.promote_types(w.dtype, torch.float32))


def tiled_threshold(tiles: Callable[[], Iterable[Tensor]], numel: int, num_kept: Tensor) -> Tensor:
    """`magnitude_threshold` of a matrix of `numel` values that is computed in tiles, in torch on any device.

    `tiles` returns an iterator over the tiles, of any shapes, one dtype (float32 or float64) and one device. It is
    called once for each pass and must yield the same values every time, and once in all if the first tile is the whole
    matrix.
    `num_kept` is never read on the host, so it may change between replays of a captured graph.
    """
    source = iter(tiles())
    first = next(source, None)
    if first is None:
        raise ValueError("tiles yielded nothing; tiled_threshold needs at least one tile.")
    if first.dtype not in _PATTERNS:
        raise ValueError(f"tiles are {first.dtype}; tiled_threshold needs float32 or float64, so cast them first.")
    passes: Iterable[Tensor] = chain([first], source)
    pattern, unread = _PATTERNS[first.dtype]
    rank = (numel - num_kept).clamp(0, numel)
    keep_all = rank == 0
    prefix = torch.zeros((), dtype=pattern, device=first.device)
    while unread > 0:
        # The narrow digit goes first, so that the widths add up to the pattern without its sign bit.
        width = unread % _DIGIT_BITS or _DIGIT_BITS
        unread -= width
        counts = torch.zeros(1 << width, dtype=torch.int64, device=first.device)
        for tile in passes:
            _count_digits(counts, tile.detach().contiguous().view(-1).view(pattern), unread, prefix)
        passes = [first] if first.numel() == numel else tiles()
        digit, rank = _bin_of(rank, counts)
        prefix = (prefix << width) + digit.to(pattern)
    threshold = prefix.view(first.dtype)
    return torch.where(keep_all, torch.full_like(threshold, KEEP_ALL), threshold)


def _bin_of(rank: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the bin that holds the entry of this rank (counted from 1), and the rank within the bin."""
    below = counts.cumsum(0)
    digit = (below < rank).sum()
    return digit, rank - (below - counts).gather(0, digit.view(1)).view(())


def _count_digits(counts: Tensor, bits: Tensor, shift: int, prefix: Tensor) -> None:
    """Adds to `counts[d]` the number of patterns with digit d at bit `shift` and `prefix` above it, sign excluded."""
    mask, width = counts.numel() - 1, counts.numel().bit_length() - 1
    leading = torch.iinfo(bits.dtype).max >> (shift + width)
    member = None  # the first digit has no prefix
    if leading:
        member = (bits >> (shift + width)).bitwise_and_(leading) == prefix
    if _on_host(bits):
        bits = bits if member is None else _select_few(bits, member)
        counts += torch.bincount((bits >> shift).bitwise_and_(mask), minlength=counts.numel())
    else:  # bincount and boolean masks wait for the device; adding zeros for non-members does not
        ones = torch.ones_like(bits) if member is None else member
        counts.scatter_add_(0, (bits >> shift).bitwise_and_(mask).long(), ones.long())


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _select_few(values: Tensor, member: Tensor) -> Tensor:
    """Returns `values[member]`, faster than indexing for few members: reads eight flags at a time as one integer."""
    if values.numel() % 8 == 0:
        group = member.view(torch.int64).nonzero()[:, 0]
        values, member = values.view(-1, 8)[group], member.view(-1, 8)[group]
    return values[member]
