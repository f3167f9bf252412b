"""Combines the updates of one weight and lowers the rank of the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peft_zoo.io.safetensors import check_finite
from peft_zoo.kernels.combining.elementwise import combine_blocks, product_blocks
from peft_zoo.kernels.combining.products import (
    Product,
    add_factors,
    concatenate,
    core,
    inner_product,
    iso,
    knots,
    norm,
    orthogonal,
    rounding_norm,
    slerp,
    tsv,
)
from peft_zoo.kernels.low_rank.certified import certified_svd
from peft_zoo.kernels.low_rank.factored import factored_svd
from peft_zoo.merge.base.plain_lora import Factors
from peft_zoo.merge.combining.options import CombineOptions
from peft_zoo.merge.combining.report import CombinedModule
from peft_zoo.merge.combining.sources import Sources

ROUNDING = 1e-13
"""Norm of a product of float64 factors, relative to the product of their norms, below which its terms cancel."""


def global_cosine(sources: Sources) -> float:
    """Returns the cosine of the angle between two adapters as a whole."""
    product, sizes = 0.0, [0.0, 0.0]
    for one, other in (pair for name in sources.modules for pair in sources.updates(name).values()):
        sizes = [
            math.hypot(size, norm(u)) if u is not None else size for size, u in zip(sizes, (one, other), strict=True)
        ]
        product += inner_product(one, other) if one is not None and other is not None else 0.0
    return product / (sizes[0] * sizes[1]) if all(sizes) else 0.0


def combine_updates(
    name: str,
    found: Sequence[Product | None],
    weights: Sequence[float],
    options: CombineOptions,
    dtype: torch.dtype,
    angle: float | None = None,
) -> tuple[CombinedModule, Factors] | None:
    """Combines the updates of one weight.

    Args:
        name: Name for the report and messages.
        found: The update of each adapter, or None.
        weights: One weight per adapter.
        options: The method.
        dtype: Dtype of the new factors.
        angle: Cosine of the angle for `"slerp"`; default None, that of the updates.

    Returns:
        A row for the report and the factors; None if the result is zero, as of weights of zero or of updates that
        cancel.
    """
    ranks = tuple(0 if update is None else len(update.A) for update in found)
    if options.resolved_space != "factors":  # in which a zero B is multiplied by the A of others
        found = [None if update is None or update.is_zero else update for update in found]
    if options.method in ("slerp", "orthogonal"):  # in which places matter
        shape = next(((len(u.B), u.A.shape[1]) for u in found if u is not None), (1, 1))
        pairs = [(_zero(*shape) if u is None else u, w) for u, w in zip(found, weights, strict=True)]
    else:
        votes = options.by_entry  # an adapter without weight still elects signs
        pairs = [(u, w) for u, w in zip(found, weights, strict=True) if u is not None and (w or votes)]
    if not any(w for u, w in pairs if not u.is_zero):
        return None
    updates, kept = [u for u, _ in pairs], [w for _, w in pairs]
    if options.resolved_space == "delta" and options.by_entry:
        blocks = [product_blocks(*(factor.float() for factor in u.wide())) for u in updates]
        shape = len(updates[0].B), updates[0].A.shape[1]
        svd = certified_svd(combine_blocks(blocks, kept, options.entries(name), shape), options.rank)
        wanted = min(options.rank or 1, len(svd.S))
        root = svd.S[:wanted].sqrt()
        B, A, size, lost = svd.U[:, :wanted] * root, root[:, None] * svd.Vh[:wanted], svd.norm, svd.error(wanted)
    else:
        exact = _product(name, updates, kept, options, angle)
        B, A, size, lost = _of_rank(*exact, options)
        size = size if size > ROUNDING * float(exact[0].norm() * exact[1].norm()) else 0.0
    if not size:
        return None
    return _rounded(name, ranks, (B, A, size, lost), dtype)


def _zero(rows: int, columns: int) -> Product:
    return Product(torch.zeros(rows, 1), torch.zeros(1, columns))


def _product(
    name: str, updates: Sequence[Product], weights: Sequence[float], options: CombineOptions, angle: float | None
) -> tuple[Tensor, Tensor]:
    """Returns factors of the combination, before its rank is lowered."""
    method, space = options.method, options.resolved_space
    if method == "slerp":
        return slerp(updates, weights[1], angle)
    if method == "tsv":
        return tsv(updates, weights, max(1, (options.rank or 1) // len(updates)))
    if space == "factors":
        return add_factors(updates, weights, options.entries(name) if options.by_entry else None)
    if space == "knots":
        return knots(updates, weights, options.entries(name))
    if space == "core":
        return core(updates, weights, options.entries(name), options.rank if options.compress_first else None)
    plain: dict[str, Callable[[Sequence[Product], Sequence[float]], tuple[Tensor, Tensor]]]
    plain = {"cat": concatenate, "linear": concatenate, "orthogonal": orthogonal, "iso": iso}
    return plain[method](updates, weights)


def _of_rank(B: Tensor, A: Tensor, options: CombineOptions) -> tuple[Tensor, Tensor, float, float]:
    """Lowers the rank of a product if it is asked for, or above that of any matrix of its size.

    Returns the factors, the norm of the product, and the relative error.
    """
    svd = factored_svd(B, A, method="qr")
    size = float(svd.singular_values.norm())
    rank = min(options.rank or A.shape[0], A.shape[0], len(B), A.shape[1])
    if rank == A.shape[0] and options.method in ("cat", "linear"):
        return B, A, size, 0.0
    low = svd.truncate(B, A, max(1, min(rank, svd.rank)))
    return low.B, low.A, size, low.error


def _rounded(
    name: str, ranks: tuple[int, ...], found: tuple[Tensor, Tensor, float, float], dtype: torch.dtype
) -> tuple[CombinedModule, Factors]:
    """Rounds factors to their dtype; `found` has their norm and the relative error of their rank too."""
    wide_B, wide_A, size, lost = found
    B, A = check_finite(f"{name}: B", wide_B.to(dtype)), check_finite(f"{name}: A", wide_A.to(dtype))
    rounding = rounding_norm(wide_B, wide_A, B, A) / size
    row = CombinedModule(name, ranks, len(A), size, math.hypot(lost, rounding), B.numel() + A.numel())
    return row, Factors(B, A)
