"""Post-Squeeze: a trained LoRA with lower ranks, from its files alone or inside a model.

Each module's update `s B A` becomes its best approximation of a lower rank, exactly, without forming it
(`peft_zoo.kernels.low_rank.factored`); the ranks follow from one number for all, an energy, a ratio, or a budget that
all modules share (`peft_zoo.kernels.planning.ranks`). The result is a plain LoRA.

Files are read twice, a module at a time: to find the singular values, and to write. Peak memory is one module and a
pair of R x R maps for each.

Source: LoRA-Squeeze (arXiv 2602.10993), Alg. 2, which leaves the split of the singular values and the scale open.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, get_args

from torch import Tensor, nn

from peft_zoo.common.checks import check_count
from peft_zoo.common.progress import Progress, silent
from peft_zoo.io import open_adapter
from peft_zoo.io.lora_ranks import RankAndScale, kept_scale
from peft_zoo.kernels.low_rank.factored import Balance, FactoredSvd, Method, factored_svd
from peft_zoo.kernels.planning.ranks import RankTarget, Spectrum, plan_ranks
from peft_zoo.merge.squeeze.file_source import FileSource
from peft_zoo.merge.squeeze.model_source import ModelSource
from peft_zoo.merge.squeeze.report import ModuleReport, RankReport, SqueezeReport
from peft_zoo.merge.squeeze.source import Source

SCALINGS = ("auto", "keep", "fold")
SCORES = ("absolute", "relative", "activation")


class HasInputs(Protocol):
    """What `peft_zoo.calibration.moments.calibrate` finds for a module."""

    @property
    def inputs(self) -> Tensor | None:
        """Second moment of the module's inputs."""


@dataclass(frozen=True)
class SqueezeOptions:
    """How to compress; see `squeeze_adapter`, whose arguments these are.

    Raises:
        ValueError: If a value is none of those allowed.
    """

    scaling: str = "auto"
    balance: Balance = "sqrt"
    method: Method = "gram"
    score: str = "absolute"
    moments: Mapping[str, Tensor | HasInputs] | None = None

    def __post_init__(self) -> None:
        choices = {"scaling": SCALINGS, "score": SCORES, "balance": get_args(Balance), "method": get_args(Method)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}.")
        if (self.score == "activation") != (self.moments is not None):
            raise ValueError(
                f"score={self.score!r} with moments {'given' if self.moments is not None else 'missing'}: activation "
                "scores need the moments that peft_zoo.calibration.moments.calibrate finds, and nothing else uses them."
            )

    def moment(self, name: str) -> Tensor | None:
        """The second moment of a module's inputs, where it is wanted.

        Raises:
            ValueError: If the module has none.
        """
        if self.moments is None:
            return None
        found = self.moments.get(name)
        found = getattr(found, "inputs", found)
        if not isinstance(found, Tensor):
            raise ValueError(f"moments has no inputs of module {name}; calibrate all modules of the adapter.")
        return found


def squeeze_adapter(
    in_dir: str | Path,
    out_dir: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SqueezeReport:
    """Compresses a saved LoRA; its base model is not needed.

    Args:
        in_dir: A folder that peft saved, or a `.safetensors` file of sd-scripts or diffusers.
        out_dir: A folder or file that does not exist yet; it appears whole or not at all.
        rank: The same rank for all modules. Exactly one of `rank`, `energy`, `budget`, `sv_ratio` and `sv_fro` is
            given.
        energy: Share of squared singular values that every module keeps, in (0, 1].
        budget: Parameters of all factors (int), or size of the file (`"24MB"`, `"8 MiB"`), shared by all modules so
            that the error is smallest.
        progress: Wraps the loops over modules.
        **options: More fields of `RankTarget` (`sv_ratio`, `sv_fro`, `rank_multiple_of`, `min_rank`, `max_rank`), and

            * `scaling`: `"keep"` leaves every scale as it is, so alpha follows the rank; `"fold"` puts the scale into
              the factors, so that alpha equals the rank, as loaders that ignore patterns want; `"auto"` (default) keeps
              where all new ranks are equal, and folds elsewhere.
            * `balance`: `"sqrt"` (default) for factors of equal size, as further training wants; `"up"` for
              orthonormal A.
            * `method`: `"gram"` (default) or `"qr"`, see `peft_zoo.kernels.low_rank.factored.truncate_factors`.
            * `score`: `"absolute"` (default), or `"activation"` to minimise the error of the outputs on data.
            * `moments`: for activation scores, second moments of inputs by module.

    Returns:
        What happened to each module.

    Raises:
        ValueError: If an argument cannot be used, a file is damaged or is no LoRA, nothing would get smaller, or the
            budget is too small. Nothing has been written then.
        NotImplementedError: If a module's update is not a plain product of two factors, naming the module.
    """
    target, how = _options(rank=rank, energy=energy, budget=budget, **options)
    if how.score == "relative":
        raise ValueError("score='relative' needs the base model's weights; use squeeze_model.")
    with open_adapter(in_dir) as adapter:
        return _squeeze(FileSource(adapter, Path(in_dir), Path(out_dir)), target, how, progress or silent)


def squeeze_model(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    into: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SqueezeReport:
    """Compresses a LoRA in a model.

    Args:
        model: A `PeftModel`, or any model with LoRA layers if `into` is None.
        adapter_name: The adapter.
        into: Name of a new adapter for the result; None replaces the old factors. An optimizer that trained these does
            not know of it.
        rank: As in `squeeze_adapter`, like all that follow.
        energy: Likewise.
        budget: Likewise; a size is that of the factors.
        progress: Likewise.
        **options: Likewise; and `score="relative"` measures singular values in units of the norm of the module's
        weight.

    Returns:
        What happened to each module; with DoRA also the error of the outputs on random inputs.

    Raises:
        ValueError: As `squeeze_adapter`; or if the adapter is not there or is merged, or `into` is taken.
        NotImplementedError: If a module's update is not a plain product of two factors, naming the module.
    """
    target, how = _options(rank=rank, energy=energy, budget=budget, **options)
    return _squeeze(ModelSource(model, adapter_name, into), target, how, progress or silent)


def rank_report(
    model_or_path: nn.Module | str | Path,
    ranks: Sequence[int] = (4, 8, 16, 32),
    adapter_name: str = "default",
    *,
    moments: Mapping[str, Tensor | HasInputs] | None = None,
    progress: Progress | None = None,
) -> RankReport:
    """How much each module would keep at some ranks; nothing is written or changed.

    Args:
        model_or_path: A model with LoRA layers, or what `squeeze_adapter` reads.
        ranks: The ranks to look at, positive.
        adapter_name: The adapter in a model.
        moments: Second moments of inputs by module, to measure on activations.
        progress: Wraps the loop over modules.

    Raises:
        ValueError: As `squeeze_adapter`.
        NotImplementedError: Likewise.
    """
    for rank in ranks:
        check_count("ranks", rank)
    how = SqueezeOptions(score="absolute" if moments is None else "activation", moments=moments)
    if isinstance(model_or_path, nn.Module):
        return _look(ModelSource(model_or_path, adapter_name, None), tuple(ranks), how, progress or silent)
    with open_adapter(model_or_path) as adapter:
        return _look(FileSource(adapter, Path(model_or_path), None), tuple(ranks), how, progress or silent)


@dataclass(frozen=True)
class _Analysis:
    """One module, decomposed."""

    svd: FactoredSvd
    spectrum: Spectrum
    scale: float


def _options(**given: Any) -> tuple[RankTarget, SqueezeOptions]:
    """Arguments by whom they concern.

    Raises:
        ValueError: If one is unknown or cannot be used.
    """
    known = {cls: {item.name for item in fields(cls)} for cls in (RankTarget, SqueezeOptions)}
    unknown = sorted(given.keys() - set().union(*known.values()))
    if unknown:
        raise ValueError(
            f"{unknown[0]}={given[unknown[0]]!r} is unknown; use {', '.join(sorted(set().union(*known.values())))}."
        )
    target, how = ({name: value for name, value in given.items() if name in names} for names in known.values())
    return RankTarget(**target), SqueezeOptions(**how)


def _squeeze(source: Source, target: RankTarget, how: SqueezeOptions, progress: Progress) -> SqueezeReport:
    found = {name: _analyse(source, name, how) for name in progress(source.names, "decompose")}
    _check_gain(found, target)
    modules, keep = _plan(source, found, target, how.scaling)
    _check_nested(modules)

    def make(name: str) -> tuple[Tensor, Tensor]:
        B, A = source.factors(name)[:2]
        rank, scale = modules[name]
        low = found[name].svd.truncate(B, A, rank, new_scale=scale, balance=how.balance)
        return low.B, low.A

    errors = source.write(modules, make)
    rows = tuple(_row(name, one, modules[name].rank, errors.get(name)) for name, one in found.items())
    report = SqueezeReport(rows, "keep" if keep else "fold", how.score)
    _warn(report)
    return report


def _look(source: Source, ranks: tuple[int, ...], how: SqueezeOptions, progress: Progress) -> RankReport:
    found = {name: _analyse(source, name, how) for name in progress(source.names, "decompose")}
    return RankReport(ranks, tuple(_row(name, one, one.spectrum.rank, None) for name, one in found.items()))


def _analyse(source: Source, name: str, how: SqueezeOptions) -> _Analysis:
    B, A, scale, min_rank = source.factors(name)
    svd = factored_svd(B, A, scale=scale, method=how.method, input_moment=how.moment(name))
    norm = source.weight_norm(name) if how.score == "relative" else 1.0
    itemsize = max(B.element_size(), A.element_size())
    spectrum = Spectrum(svd.singular_values / norm, len(A), len(B) + A.shape[1], itemsize, min_rank)
    return _Analysis(svd, spectrum, scale)


def _plan(
    source: Source, found: Mapping[str, _Analysis], target: RankTarget, scaling: str
) -> tuple[dict[str, RankAndScale], bool]:
    """New ranks and scales, and whether the scales are the old ones.

    A size also has to hold what a file needs besides factors, and that depends on the ranks: hence the loop. It ends
    because what is set aside only grows, up to what the worst ranks need.
    """
    spectra = {name: one.spectrum for name, one in found.items()}
    reserved = 0
    while True:
        ranks = plan_ranks(spectra, target, reserved=reserved)
        keep = scaling == "keep" or (scaling == "auto" and len(set(ranks.values())) == 1)
        modules = {
            name: RankAndScale(rank, kept_scale(found[name].scale) if keep else 1.0) for name, rank in ranks.items()
        }
        if not any(ranks.values()):
            raise ValueError(f"budget={target.budget!r} would drop every module; raise the budget or min_rank.")
        needed = source.overhead(modules)
        if needed <= reserved:
            return modules, keep
        reserved = needed


def _check_gain(found: Mapping[str, _Analysis], target: RankTarget) -> None:
    largest = max(one.spectrum.rank for one in found.values())
    if target.rank is not None and target.rank >= largest:
        raise ValueError(
            f"target rank {target.rank} is not smaller than the current rank {largest} for every module; nothing to "
            f"squeeze (use rank < {largest})."
        )


def _check_nested(modules: Mapping[str, RankAndScale]) -> None:
    """A layer inside an adapted one, attention's projection, has its rank and alpha: no pattern tells them apart."""
    nested = [name for name in modules if ".base_layer." in name]
    if nested and len(set(modules.values())) > 1:
        raise NotImplementedError(
            f"{nested[0]} cannot have another rank or scale than the layer around it; use rank=..., the same for all."
        )


def _row(name: str, one: _Analysis, rank: int, output_error: float | None) -> ModuleReport:
    spectrum, svd = one.spectrum, one.svd
    return ModuleReport(
        name=name,
        old_rank=spectrum.rank,
        new_rank=rank,
        energy=svd.energy(rank),
        rel_error=svd.error(rank),
        numerical_rank=svd.rank,
        params_before=spectrum.rank * spectrum.parameters,
        params_after=rank * spectrum.parameters,
        singular_values=tuple(svd.singular_values.tolist()),
        output_error=output_error,
    )


def _warn(report: SqueezeReport) -> None:
    untrained = [module.name for module in report.modules if module.untrained]
    if untrained:
        warnings.warn(
            f"adapter is untrained (B = 0) in {len(untrained)} modules, such as {untrained[0]}.", stacklevel=4
        )
    worst = report.worst
    if worst.energy < 0.5:
        warnings.warn(
            f"{worst.name} keeps only {worst.energy:.1%} of its energy at rank {worst.new_rank}; use a higher rank, or "
            "train on after the squeeze (SqueezeLoraConfig).",
            stacklevel=4,
        )


__all__ = ["RankReport", "SqueezeReport", "rank_report", "squeeze_adapter", "squeeze_model"]
