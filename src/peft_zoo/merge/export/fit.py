"""Finds the factors of every module: exact ones, or the best of a rank, an error or a shared budget."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peft_zoo.common.progress import Progress
from peft_zoo.io.expert_names import is_expert
from peft_zoo.io.safetensors import check_finite
from peft_zoo.kernels.low_rank.certified import PRECISION, frobenius_norm
from peft_zoo.kernels.planning.ranks import RankTarget, Spectrum, plan_ranks
from peft_zoo.merge.base.plain_lora import Factors
from peft_zoo.merge.export.options import ExportOptions
from peft_zoo.merge.export.report import ExportedModule
from peft_zoo.merge.export.source import UpdateSource
from peft_zoo.merge.export.updates import Update, decompose, error_of

LISTED = (8, 16, 32, 64)  # ranks whose errors a refusal lists
MOST_EXACT = 256  # largest rank that is exported exactly without being asked for
PLANNED = 256  # largest rank that a shared budget or error considers
MOST_TRIES = 4  # ranks tried if rounding makes an error larger than it was asked to be
PROBES = 4  # random inputs of each module with which the result is checked


@dataclass(frozen=True)
class Fit:
    """Factors of one module as they are stored.

    Attributes:
        row: Rank and error for the report.
        B: Factor `(rows, r)`.
        A: Factor `(r, columns)`.
        scale: Scale of the product.
    """

    row: ExportedModule
    B: Tensor
    A: Tensor
    scale: float

    @property
    def factors(self) -> Factors:
        """The factors without the report."""
        return Factors(self.B, self.A, self.scale)

    def padded(self, rank: int) -> Fit:
        """Returns the same update with zeros in further columns of B and rows of A."""
        if rank <= len(self.A):
            return self
        found = self.factors.padded(rank)
        row = replace(self.row, rank=rank, parameters=found.B.numel() + found.A.numel())
        return replace(self, B=found.B, A=found.A, row=row)


def probes(name: str, columns: int) -> Tensor:
    """Returns random inputs `(columns, 4)` of a module, the same for the same name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(columns, PROBES, generator=generator)


def fit_all(source: UpdateSource, names: list[str], options: ExportOptions, progress: Progress) -> dict[str, Fit]:
    """Finds the factors of the modules `names`.

    Raises:
        ValueError: If nothing sets the ranks and an update has no exact factors; it lists the errors of some ranks.
    """
    ranks = _shared_ranks(source, names, options, progress)
    scale = _kept_scale(source, names, options)
    found: dict[str, Fit] = {}
    for name in progress(names, "export"):
        update = source.update(name)
        rank = ranks.get(name)
        if options.chosen is None:
            rank = _exact_rank(update)
            if rank is None:
                owner = f"{name} of a {source.label}" if source.exact else f"a {source.label}"
                raise ValueError(_no_exact(source, names, progress, f"{owner} has no exact LoRA"))
        found[name] = _fit(source, name, update, rank, scale, options)
    _check_shared_error(found, options)
    experts = [name for name in names if is_expert(name)]
    most = max((len(found[name].A) for name in experts), default=0)
    return {name: fit.padded(most) if name in experts else fit for name, fit in found.items()}


def _check_shared_error(fits: Mapping[str, Fit], options: ExportOptions) -> None:
    """Raises a ValueError if rounding has made the error of all updates together larger than it may be."""
    if options.max_error is None or options.per_layer or options.moments is not None:
        return
    rows = [fit.row for fit in fits.values()]
    lost, total = math.hypot(*(row.lost for row in rows)), math.hypot(*(row.norm for row in rows))
    if lost > options.max_error * total * (1 + 1e-3) + PRECISION * total:
        raise ValueError(
            f"max_error={options.max_error}: the error of all updates together is {lost / total:.2g} in the dtype of "
            "the factors; pass dtype='float32', or allow a larger one."
        )


def _exact_rank(update: Update) -> int | None:
    """Returns the rank of an update that is a product of factors, or a matrix of at most half the full rank."""
    if update.factors is not None:
        rank = len(update.factors[1])
        return rank if rank <= MOST_EXACT else None
    most = min(LISTED[-1], max(1, min(update.shape) // 2))
    found = decompose(update, most)
    rank = found.rank(update.noise)
    return rank if rank <= most and found.error(rank) <= update.noise else None


def _fit(
    source: UpdateSource, name: str, update: Update, rank: int | None, scale: float | None, options: ExportOptions
) -> Fit:
    """Finds the factors of one module; `rank` None: those of the options' error."""
    exact = update.factors
    if exact is not None and rank is not None and len(exact[1]) <= rank:
        factor, new_scale = (1.0, scale) if scale is not None else (update.scale, 1.0)
        B = exact[0] if factor == 1 else exact[0].double() * factor
        return _stored(source, name, update, (B, exact[1], new_scale, "exact"), options)
    bound = None if rank is not None else options.error
    found = decompose(update, rank, error=bound, moment=options.moment(name))
    wanted = rank if rank is not None else found.rank(options.error or 0.0)
    step, most = options.rank_multiple_of, min(update.limit, len(found.singular_values))
    tried = range(min(math.ceil(wanted / step) * step, most), most + 1, step)
    for tries, new_rank in enumerate(tried, 1):  # rounding to the dtype may need some more directions
        fit = _stored(source, name, update, (*found.factors(new_rank), 1.0, found.method), options)
        error = fit.row.error if fit.row.output_error is None else fit.row.output_error
        if bound is None or error <= bound + PRECISION:
            return fit
        if tries == MOST_TRIES:
            break
    raise ValueError(
        f"{name}: {options.chosen}={getattr(options, options.chosen or '')}: the error is {error:.2g} in "
        f"{fit.B.dtype}, whatever the rank; pass dtype='float32', or allow a larger one."
    )


def _stored(
    source: UpdateSource, name: str, update: Update, found: tuple[Tensor, Tensor, float, str], options: ExportOptions
) -> Fit:
    """Rounds B and A to the dtype of the LoRA and computes their error; `found` has their scale and method too."""
    B, A, scale, method = found
    moment, dtype = options.moment(name), options.dtype_of(source.modules[name].dtype)
    B, A = check_finite(f"{name}: B", B.to(dtype)), check_finite(f"{name}: A", A.to(dtype))
    row = ExportedModule(
        name=name,
        rank=len(A),
        error=error_of(update, B, A, scale),
        norm=_norm(update),
        method=method,
        parameters=len(A) * (len(B) + A.shape[1]),
        output_error=None if moment is None else error_of(update, B, A, scale, moment),
    )
    return Fit(row, B.cpu(), A.cpu(), scale)


def _norm(update: Update) -> float:
    """Frobenius norm of an update."""
    if update.factors is None:
        return frobenius_norm(update.matrix())
    B, A = (factor.double() for factor in update.factors)
    return abs(update.scale) * math.sqrt(max(0.0, ((B.mT @ B) * (A @ A.mT)).sum().item()))


def _kept_scale(source: UpdateSource, names: list[str], options: ExportOptions) -> float | None:
    """Returns the scale that all modules have and keep; None if the scales are multiplied into B.

    A common scale is the same for every program, whether it reads patterns or not, and factors of 16 bits keep their
    values, which a multiplication would round. Powers of two do not round.
    """
    modules = [source.modules[name] for name in names]
    scales = {module.scale for module in modules}
    scale = next(iter(scales))
    if len(scales) > 1 or scale is None or scale <= 0 or math.frexp(scale)[0] == 0.5:
        return None
    if options.dtype != "adapter" or all(module.dtype.itemsize > 2 for module in modules):
        return None
    largest = max(module.rank or 0 for module in modules)
    return scale if options.chosen is None or (options.rank is not None and largest <= options.rank) else None


def _shared_ranks(
    source: UpdateSource, names: list[str], options: ExportOptions, progress: Progress
) -> Mapping[str, int]:
    """Returns the ranks that are known before the modules are fitted: one for all, or those of a shared target."""
    if options.rank is not None:
        return dict.fromkeys(names, options.rank)
    if options.budget is None and (options.max_error is None or options.per_layer):
        return {}
    spectra: dict[str, Spectrum] = {}
    totals: dict[str, float] = {}
    for name in progress(names, "decompose"):
        update, module = source.update(name), source.modules[name]
        limit = min(update.limit, PLANNED)
        found = decompose(update, limit, moment=options.moment(name))
        values = found.singular_values[:limit]
        itemsize = options.dtype_of(module.dtype).itemsize
        spectra[name] = Spectrum(values, max(1, len(values)), sum(update.shape), itemsize)
        totals[name] = found.norm**2
    if options.budget is not None:
        target = RankTarget(budget=options.budget, rank_multiple_of=options.rank_multiple_of)
        return plan_ranks(spectra, target)
    return _least_parameters(spectra, totals, options.max_error or 0.0)


def _least_parameters(spectra: Mapping[str, Spectrum], totals: Mapping[str, float], error: float) -> dict[str, int]:
    """Returns ranks with which all updates together have a relative error, for about the fewest parameters.

    Directions are added in the order of their squared singular value for each parameter.
    """
    ranks = dict.fromkeys(spectra, 1)
    lost = sum(totals.values()) - sum(s.singular_values[0].item() ** 2 for s in spectra.values())
    allowed = error**2 * sum(totals.values()) * (1 + 1e-9)
    steps = [
        (value.item() ** 2 / spectrum.parameters, value.item() ** 2, name)
        for name, spectrum in spectra.items()
        for value in spectrum.singular_values[1:]
    ]
    for _, gain, name in sorted(steps, key=lambda step: -step[0]):
        if lost <= allowed:
            return ranks
        ranks[name] += 1
        lost -= gain
    if lost > allowed:
        reached = math.sqrt(max(0.0, lost) / sum(totals.values()))
        raise ValueError(
            f"max_error={error}: ranks up to {PLANNED} reach {reached:.3g} for all updates together; pass "
            "per_layer=True, or a larger error."
        )
    return ranks


def _no_exact(source: UpdateSource, names: list[str], progress: Progress, why: str) -> str:
    """Returns the sentence that lists the errors of some ranks for all updates together."""
    lost, total = [0.0] * len(LISTED), 0.0
    for name in progress(names, "decompose"):
        update = source.update(name)
        found = decompose(update, min(LISTED[-1], update.limit))
        total += found.norm**2
        lost = [one + found.norm**2 * found.error(rank) ** 2 for one, rank in zip(lost, LISTED, strict=True)]
    errors = "/".join(f"{math.sqrt(one / total) if total else 0.0:.2g}" for one in lost)
    return f"rank=None: {why}; errors at r={'/'.join(map(str, LISTED))}: {errors}; pass rank=, max_error= or energy=."
