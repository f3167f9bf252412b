"""The exact k-th smallest magnitude of a matrix that is only seen in tiles.

Non-negative IEEE floats are ordered like their bit patterns read as integers, so the k-th smallest magnitude is
found digit by digit: histogram the leading digit of every pattern, keep the bin in which rank k falls, histogram
the next digit of that bin's members only (radix selection). 32-bit floats take 2 passes, 64-bit floats 4. Nothing
is sorted or copied, counts are ``int64`` (exact for any size), and on an accelerator no value ever travels to
the host.

Definition, for ``w`` flattened to ``N`` values and ``n`` of them to be kept::

    threshold = sort(|w|)[N - n - 1]        so that |w| > threshold keeps n values when no two of them tie

with two limits: ``n >= N`` gives ``-1`` (below every magnitude: all are kept) and ``n <= 0`` the largest magnitude
(none is kept). Ties at the threshold are all dropped: the number kept may fall short of ``n`` but never exceeds it.
NaN counts as larger than infinity, as in ``torch.sort``, and is never greater than the threshold: a NaN in the
matrix takes one of the ``n`` places and nothing is kept beyond ``n``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor

KEEP_ALL = -1.0
"""The threshold below every magnitude."""

_DIGIT_BITS = 16
_PATTERNS = {torch.float32: (torch.int32, 31), torch.float64: (torch.int64, 63)}


def magnitude_threshold_reference(w: Tensor, num_kept: int) -> Tensor:
    """The definition: sort all magnitudes and take one of them. Arguments and result as `magnitude_threshold`."""
    rank = w.numel() - num_kept
    if rank <= 0:
        return w.new_tensor(KEEP_ALL)
    return w.abs().flatten().sort().values[min(rank, w.numel()) - 1]


def magnitude_threshold(tiles: Callable[[], Iterable[Tensor]], numel: int, num_kept: Tensor) -> Tensor:
    """The magnitude above which exactly ``num_kept`` of ``numel`` values lie (fewer if they tie).

    Args:
        tiles: Returns a fresh iterator over the tiles of the matrix, any shapes, one dtype (float32 or float64) and
            one device. It is called once per pass and must yield the same values every time; a single tile that
            covers everything is asked for once.
        numel: How many values the tiles hold in all.
        num_kept: How many of them to keep, int64 of shape `()`, on the device of the tiles. It is never read on the
            host, so it may change between replays of a captured graph.

    Returns:
        The threshold, shape `()`, in the dtype of the tiles.

    Raises:
        ValueError: If the tiles are neither float32 nor float64, or there are none.
    """
    source = iter(tiles())
    first = _first_tile(source)
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


def _first_tile(source: Iterator[Tensor]) -> Tensor:
    first = next(source, None)
    if first is None:
        raise ValueError("tiles yielded nothing; magnitude_threshold needs at least one tile.")
    if first.dtype not in _PATTERNS:
        raise ValueError(f"tiles are {first.dtype}; magnitude_threshold needs float32 or float64, so cast them first.")
    return first


def _bin_of(rank: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The bin that holds the entry of this rank (counted from 1), and its rank within the bin."""
    below = counts.cumsum(0)
    digit = (below < rank).sum()
    return digit, rank - (below - counts).gather(0, digit.view(1)).view(())


def _count_digits(counts: Tensor, bits: Tensor, shift: int, prefix: Tensor) -> None:
    """Add to `counts[d]` how many patterns have the digit d at `shift`, and above it, without the sign, `prefix`."""
    mask, width = counts.numel() - 1, counts.numel().bit_length() - 1
    leading = torch.iinfo(bits.dtype).max >> (shift + width)
    member = None  # the first digit has nothing above it
    if leading:
        member = (bits >> (shift + width)).bitwise_and_(leading) == prefix
    if _on_host(bits):
        bits = bits if member is None else _select_few(bits, member)
        counts += torch.bincount((bits >> shift).bitwise_and_(mask), minlength=counts.numel())
    else:  # bincount and boolean masks wait for the device; adding zeros for the others does not
        ones = torch.ones_like(bits) if member is None else member
        counts.scatter_add_(0, (bits >> shift).bitwise_and_(mask).long(), ones.long())


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _select_few(values: Tensor, member: Tensor) -> Tensor:
    """`values[member]`, faster where few are members: eight flags at a time are looked at as one integer."""
    if values.numel() % 8 == 0:
        group = member.view(torch.int64).nonzero()[:, 0]
        values, member = values.view(-1, 8)[group], member.view(-1, 8)[group]
    return values[member]
