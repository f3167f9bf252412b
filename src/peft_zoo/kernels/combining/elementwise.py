r"""Combines matrices entry by entry: TIES, DARE and magnitude pruning.

For matrices T_1 ... T_k of one shape, weights w_t and a density d::

    trimmed        the floor(d N) entries of largest magnitude of T_t, the others zero
    dropped        each entry of T_t with probability d, divided by d, the others zero

    magnitude_prune    sum_t w_t trimmed(T_t)
    dare_linear        sum_t w_t dropped(T_t)
    ties               sum_t w_t T'_t [sign T'_t = g] / max(1, number of t with sign T'_t = g)       T' = trimmed
    dare_ties          the same with T' = dropped

g is the elected sign of an entry: that of the sum of the T'_t (`"total"`) or of the sum of their signs
(`"frequency"`), and + if that is zero. Signs are elected before the weights are applied.

Of entries with equal magnitudes those of lower index are kept. The random bits of DARE are those of `philox` at the
entry's row and column, so they depend neither on the order of the work nor on the device.

Matrices that are products of factors are computed in blocks of rows; no more than one whole matrix is in memory.

Sources: TIES, Yadav et al., arXiv 2306.01708; DARE, Yu et al., arXiv 2311.03099.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from peft_zoo.common.checks import check, check_choice, check_int, check_share
from peft_zoo.kernels.random_matrix.philox import philox
from peft_zoo.kernels.sparse.threshold import tiled_threshold

Rule = Literal["ties", "dare_ties", "dare_linear", "magnitude_prune"]
Sign = Literal["total", "frequency"]
Blocks = Callable[[], Iterator[Tensor]]
"""Returns an iterator over the blocks of rows of a matrix, from the first row to the last."""

DROPPING = 3  # third counter word of philox, reserved for dropped entries; the fourth is the number of the matrix
ROWS = 256  # rows in a block of a product


@dataclass(frozen=True)
class Elementwise:
    """How matrices are combined entry by entry.

    Attributes:
        rule: `"ties"`, `"dare_ties"`, `"dare_linear"` or `"magnitude_prune"`.
        density: Share of entries to keep, in (0, 1].
        sign: How signs are elected: `"total"` (default) or `"frequency"`.
        seed: Seed of dropped entries, from 0 to 2^63 - 1; default 0.
        first: Number of the first matrix, at least 0; default 0. Matrices of other numbers drop other entries.

    Raises:
        ValueError: If a field is invalid.

    Examples:
        >>> Elementwise("ties", density=0.5).is_random
        False
    """

    rule: Rule
    density: float
    sign: Sign = "total"
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, get_args(Rule))
        check(self.density is not None, "density", self.density, "give the share of entries to keep, in (0, 1]")
        check_share("density", self.density)
        check_choice("sign", self.sign, get_args(Sign))
        check_int("seed", self.seed, 0, 2**63 - 1)
        check_int("first", self.first, 0, 2**31)

    @property
    def is_random(self) -> bool:
        """Whether entries are dropped at random instead of by magnitude."""
        return self.rule.startswith("dare")

    @property
    def elects(self) -> bool:
        """Whether entries of the sign that is not elected are left out."""
        return self.rule.endswith("ties")


def combine_entries(matrices: Sequence[Tensor], weights: Sequence[float], how: Elementwise) -> Tensor:
    """Combines whole matrices.

    Args:
        matrices: Matrices of one shape `(m, n)`, float32 or float64.
        weights: One finite weight per matrix; negative ones are allowed.
        how: The rule.

    Returns:
        The combined matrix, in the dtype of the matrices.

    Examples:
        >>> import torch
        >>> T = torch.tensor([[3.0, -1.0, 0.5]]), torch.tensor([[-1.0, -2.0, 0.1]])
        >>> combine_entries(T, [1.0, 1.0], Elementwise("ties", density=0.67))
        tensor([[ 3.0000, -1.5000,  0.0000]])
    """
    return combine_blocks([_one_block(matrix) for matrix in matrices], weights, how, matrices[0].shape)


def combine_blocks(
    matrices: Sequence[Blocks], weights: Sequence[float], how: Elementwise, shape: Sequence[int]
) -> Tensor:
    """Combines matrices of which blocks of rows are computed when they are needed.

    Args:
        matrices: Blocks of rows of each matrix, float32 or float64, cut alike; they are computed up to three times and
            must be equal each time.
        weights: One finite weight per matrix.
        how: The rule.
        shape: Shape `(m, n)` of the matrices.

    Returns:
        The combined matrix `(m, n)`.
    """
    keep = [
        _Dropping(how, number) if how.is_random else _Trimming(how, blocks, shape)
        for number, blocks in enumerate(matrices, how.first)
    ]
    combined = None
    row = 0
    for parts in zip(*(blocks() for blocks in matrices), strict=True):
        kept = [selection(part, row) for selection, part in zip(keep, parts, strict=True)]
        if combined is None:
            combined = torch.empty(*shape, dtype=parts[0].dtype, device=parts[0].device)
        combined[row : row + len(parts[0])] = _combined(kept, weights, how)
        row += len(parts[0])
    assert combined is not None
    return combined


def product_blocks(B: Tensor, A: Tensor) -> Blocks:
    """Returns the blocks of rows of `B A`."""

    def blocks() -> Iterator[Tensor]:
        return (rows @ A for rows in B.split(ROWS))

    return blocks


def _one_block(matrix: Tensor) -> Blocks:
    """Returns a matrix as one block."""

    def blocks() -> Iterator[Tensor]:
        yield matrix

    return blocks


def _combined(kept: Sequence[Tensor], weights: Sequence[float], how: Elementwise) -> Tensor:
    """Sums the kept entries with weights, those of the elected sign only if the rule elects signs."""
    if not how.elects:
        return sum((weight * part for weight, part in zip(weights, kept, strict=True)), torch.zeros_like(kept[0]))
    votes = sum((part if how.sign == "total" else part.sign() for part in kept), torch.zeros_like(kept[0]))
    elected = torch.where(votes >= 0, 1.0, -1.0).to(votes)
    total, voters = torch.zeros_like(votes), torch.zeros_like(votes)
    for weight, part in zip(weights, kept, strict=True):
        agrees = part.sign() == elected
        total += torch.where(agrees, weight * part, 0.0)
        voters += agrees
    return total / voters.clamp(min=1)


class _Trimming:
    """Keeps the entries of largest magnitude of one matrix, by its blocks from the first to the last."""

    def __init__(self, how: Elementwise, blocks: Blocks, shape: Sequence[int]) -> None:
        size = shape[0] * shape[1]
        kept = int(how.density * size)
        self._threshold = tiled_threshold(blocks, size, torch.tensor(kept))
        # Entries that tie at the threshold are kept until the number is reached.
        self._ties = kept - sum(int((part.abs() > self._threshold).sum()) for part in blocks())

    def __call__(self, part: Tensor, _: int) -> Tensor:
        size = part.abs()
        mask = size > self._threshold
        if self._ties:
            ties = size == self._threshold
            taken = ties & (ties.flatten().cumsum(0).view_as(ties) <= self._ties)
            self._ties -= int(taken.sum())
            mask |= taken
        return torch.where(mask, part, 0.0)


class _Dropping:
    """Keeps entries of one matrix at random and scales them up."""

    def __init__(self, how: Elementwise, number: int) -> None:
        self._how, self._number = how, number

    def __call__(self, part: Tensor, row: int) -> Tensor:
        m, n = part.shape
        quads = torch.arange(-(-n // 4), device=part.device)
        rows = torch.arange(row, row + m, device=part.device)[:, None]
        words = torch.stack(philox(self._how.seed, quads, rows, DROPPING, self._number), -1).flatten(1)[:, :n]
        return torch.where(words < self._how.density * 2**32, part / self._how.density, 0.0)
