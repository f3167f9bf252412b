"""Post-Squeeze: lowers the ranks of a trained LoRA, in adapter files without the base model or inside a model.

Each module's update `s B A` becomes its best approximation of a lower rank, computed exactly from the factors
(`peft_zoo.kernels.low_rank.factored`). The ranks follow from one rank for all modules, an energy, a ratio of singular
values, or a budget that all modules share (`peft_zoo.kernels.planning.ranks`). The result is a plain LoRA.

Files are read twice, one module at a time: for the singular values and for writing. Peak memory is one module and two
R x R matrices for each module.

Source: LoRA-Squeeze (arXiv 2602.10993), Alg. 2, which leaves the split of the singular values and the scale open.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from peft_zoo.calibration.moments import Moments, input_moment
from peft_zoo.common.checks import check_choice, check_count
from peft_zoo.common.progress import Progress, silent
from peft_zoo.io import open_adapter
from peft_zoo.io.lora_ranks import RankAndScale, kept_scale
from peft_zoo.kernels.low_rank.factored import Balance, FactoredSvd, LowRank, factored_svd
from peft_zoo.kernels.low_rank.sketch import sketched_error
from peft_zoo.kernels.low_rank.triangle import Method
from peft_zoo.kernels.planning.ranks import RankTarget, Spectrum, plan_ranks
from peft_zoo.merge.squeeze.file_source import FileSource
from peft_zoo.merge.squeeze.model_source import ModelSource
from peft_zoo.merge.squeeze.report import ModuleReport, RankReport, SqueezeReport

SqueezeSource = FileSource | ModelSource

SCALINGS = ("auto", "keep", "fold")
SCORES = ("absolute", "relative", "activation")


@dataclass(frozen=True)
class SqueezeOptions:
    """Options of `squeeze_adapter` besides the target ranks, documented there."""

    scaling: str = "auto"
    balance: Balance = "sqrt"
    method: Method = "gram"
    score: str = "absolute"
    moments: Mapping[str, Tensor | Moments] | None = None

    def __post_init__(self) -> None:
        choices = {"scaling": SCALINGS, "score": SCORES, "balance": get_args(Balance), "method": get_args(Method)}
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        if (self.score == "activation") != (self.moments is not None):
            raise ValueError(
                f"score={self.score!r} with moments {'given' if self.moments is not None else 'missing'}: pass "
                "moments=calibrate(...) of peft_zoo.calibration together with score='activation', or neither."
            )

    def input_moment(self, name: str) -> Tensor | None:
        """Second moment of a module's inputs for activation scores; None for other scores."""
        return None if self.moments is None else input_moment(self.moments, name)


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
    """Lowers the ranks of a saved LoRA without its base model.

    Args:
        in_dir: Folder saved by peft, or `.safetensors` file of sd-scripts or diffusers.
        out_dir: Folder or file to create; it appears complete or not at all.
        rank: Rank of all modules. Exactly one of `rank`, `energy`, `budget`, `sv_ratio` and `sv_fro` is given.
        energy: Share of squared singular values that every module keeps, in (0, 1].
        budget: Number of parameters of all factors (int) or size of the file (`"24MB"`, `"8 MiB"`), shared by all
            modules so that the total error is smallest.
        progress: Wraps the loop over module names, such as a progress bar; None shows nothing.
        **options: Other fields of `RankTarget` (`sv_ratio`, `sv_fro`, `rank_multiple_of`, `min_rank`, `max_rank`), and

            * `scaling`: `"keep"` leaves every scale, so alpha follows the rank; `"fold"` multiplies the scale into the
              factors, so alpha equals the rank, for loaders that ignore patterns; `"auto"` (default) keeps if all new
              ranks are equal and folds otherwise.
            * `balance`: `"sqrt"` (default) gives both factors the same norms, for further training; `"up"` makes A
              orthonormal.
            * `method`: `"gram"` (default) or `"qr"`, see `peft_zoo.kernels.low_rank.factored.truncate_factors`.
            * `score`: `"absolute"` (default) minimizes the error of the updates, `"activation"` that of their outputs
              on calibration data.
            * `moments`: second moments of inputs by module name, for activation scores, from
              `peft_zoo.calibration.calibrate`.

    Returns:
        Ranks and errors of every module.

    Raises:
        ValueError: If an argument or file is invalid, no rank would become lower, or the budget is too small. Nothing
            is written then.
        NotImplementedError: If a module's update is not `s * B A`; names the module.

    Examples:
        >>> import tempfile, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_zoo.merge import squeeze_adapter
        >>> config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(f"{folder}/large")
        ...     report = squeeze_adapter(f"{folder}/large", f"{folder}/small", rank=6)
        >>> report.params_before, report.params_after
        (256, 192)
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
    """Lowers the ranks of a LoRA in a model, in place or as a new adapter.

    Args:
        model: A `PeftModel`, or any model with LoRA layers if `into` is None.
        adapter_name: Name of the adapter.
        into: Name of a new adapter for the result; None replaces the factors in place. The state of an existing
            optimizer is not adapted; use `LoraSqueezer` during training.
        rank: Rank of all modules. Exactly one of `rank`, `energy`, `budget`, `sv_ratio` and `sv_fro` is given.
        energy: Share of squared singular values that every module keeps, in (0, 1].
        budget: Number of parameters (int) or size (`"24MB"`) of all factors, shared by all modules.
        progress: Wraps the loop over module names, such as a progress bar; None shows nothing.
        **options: Options of `squeeze_adapter`; here `score` can also be `"relative"`, which divides the singular
            values of each module by the norm of its base weight.

    Returns:
        Ranks and errors of every module; with DoRA also the output error on random inputs.

    Raises:
        ValueError: If an argument is invalid for `squeeze_adapter`, the adapter is missing or merged, or `into` exists.
        NotImplementedError: If a module's update is not `s * B A`; names the module.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_zoo.merge import squeeze_model
        >>> config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config)
        >>> report = squeeze_model(model, rank=6, into="small")
        >>> model.set_adapter("small")
        >>> model.peft_config["small"].r
        6
    """
    target, how = _options(rank=rank, energy=energy, budget=budget, **options)
    return _squeeze(ModelSource(model, adapter_name, into), target, how, progress or silent)


def rank_report(
    model_or_path: nn.Module | str | Path,
    ranks: Sequence[int] = (4, 8, 16, 32),
    adapter_name: str = "default",
    *,
    moments: Mapping[str, Tensor | Moments] | None = None,
    progress: Progress | None = None,
) -> RankReport:
    """Measures how much of each module's update several ranks would keep; changes nothing.

    Args:
        model_or_path: A model with LoRA layers, or a path as for `squeeze_adapter`.
        ranks: Ranks to report, positive.
        adapter_name: Name of the adapter if a model is given.
        moments: Second moments of inputs by module name, to measure the outputs on calibration data instead.
        progress: Wraps the loop over module names, such as a progress bar; None shows nothing.

    Returns:
        Singular values of every module, and the share of their squares that each rank keeps.

    Raises:
        ValueError: If an argument or file is invalid.
        NotImplementedError: If a module's update is not `s * B A`; names the module.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_zoo.merge import rank_report
        >>> config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config)
        >>> report = rank_report(model, ranks=(4, 8))
        >>> report.energy("0", 4) < report.energy("0", 8)
        True
    """
    for rank in ranks:
        check_count("ranks", rank)
    how = SqueezeOptions(score="absolute" if moments is None else "activation", moments=moments)
    if isinstance(model_or_path, nn.Module):
        return _measure(ModelSource(model_or_path, adapter_name, None), tuple(ranks), how, progress or silent)
    with open_adapter(model_or_path) as adapter:
        return _measure(FileSource(adapter, Path(model_or_path), None), tuple(ranks), how, progress or silent)


@dataclass(frozen=True)
class _Analysis:
    """Singular value decomposition of one module's update."""

    svd: FactoredSvd
    spectrum: Spectrum
    rank: int
    scale: float


def _options(**given: Any) -> tuple[RankTarget, SqueezeOptions]:
    """Splits keyword arguments into the target ranks and the other options."""
    known = {cls: {item.name for item in fields(cls)} for cls in (RankTarget, SqueezeOptions)}
    unknown = sorted(given.keys() - set().union(*known.values()))
    if unknown:
        raise ValueError(
            f"{unknown[0]}={given[unknown[0]]!r} is unknown; use {', '.join(sorted(set().union(*known.values())))}."
        )
    target, how = ({name: value for name, value in given.items() if name in names} for names in known.values())
    return RankTarget(**target), SqueezeOptions(**how)


def _squeeze(source: SqueezeSource, target: RankTarget, how: SqueezeOptions, progress: Progress) -> SqueezeReport:
    """Decomposes all modules, plans their ranks and writes the new factors."""
    found = {name: _decompose(source, name, how) for name in progress(source.names, "decompose")}
    _check_gain(found, target)
    modules, keep = _plan(source, found, target, how.scaling)
    _check_nested(modules)

    def truncated(name: str) -> tuple[str, Tensor, Tensor]:
        B, A, old_scale, _ = source.factors(name)
        rank, scale = modules[name]
        low = found[name].svd.truncate(B, A, rank, new_scale=scale, balance=how.balance)
        measured = sketched_error((B, A), (low.B, low.A), (old_scale, scale), how.input_moment(name))
        _check_error(name, low, measured, how.method)
        return name, low.B, low.A

    errors = source.write(modules, map(truncated, [name for name, new in modules.items() if new.rank]))
    rows = tuple(_row(name, one, modules[name].rank, errors.get(name)) for name, one in found.items())
    report = SqueezeReport(rows, "keep" if keep else "fold", how.score)
    _warn(report)
    return report


def _measure(source: SqueezeSource, ranks: tuple[int, ...], how: SqueezeOptions, progress: Progress) -> RankReport:
    """Decomposes all modules and reports their singular values."""
    found = {name: _decompose(source, name, how) for name in progress(source.names, "decompose")}
    return RankReport(ranks, tuple(_row(name, one, one.rank, None) for name, one in found.items()))


def _decompose(source: SqueezeSource, name: str, how: SqueezeOptions) -> _Analysis:
    """Decomposes the update of one module."""
    B, A, scale, min_rank = source.factors(name)
    svd = factored_svd(B, A, scale=scale, method=how.method, input_moment=how.input_moment(name))
    norm = source.weight_norm(name) if how.score == "relative" else 1.0
    itemsize = max(B.element_size(), A.element_size())
    largest = min(len(A), len(B), A.shape[1])  # a higher rank than the matrix allows adds nothing
    spectrum = Spectrum(svd.singular_values / norm, largest, len(B) + A.shape[1], itemsize, min_rank)
    return _Analysis(svd, spectrum, len(A), scale)


def _check_error(name: str, low: LowRank, measured: float, method: str) -> None:
    """Raises a ValueError if new factors have a larger error than their decomposition promised.

    The bound allows for the noise of the sketch and for the rounding to the dtypes of the factors.
    """
    rounding = max(torch.finfo(factor.dtype).eps for factor in (low.B, low.A)) * len(low.A) ** 0.5
    if not measured <= 3 * low.error + 4 * rounding + 2e-6:
        raise ValueError(
            f"module {name}: the new factors have the error {measured:.1e} instead of {low.error:.1e}, because the old "
            f"ones cancel beyond the precision of their dtype; use {'method=qr' if method == 'gram' else 'float32'}."
        )


def _plan(
    source: SqueezeSource, found: Mapping[str, _Analysis], target: RankTarget, scaling: str
) -> tuple[dict[str, RankAndScale], bool]:
    """Plans new ranks and scales; also returns whether the scales are kept.

    A budget in bytes includes the header and other tensors of the file, whose size depends on the ranks: hence the
    loop. It terminates because `reserved` only grows, up to the overhead of the worst ranks.
    """
    spectra = {name: one.spectrum for name, one in found.items()}
    reserved = 0
    while True:
        ranks = plan_ranks(spectra, target, reserved=reserved)
        keep = scaling == "keep" or (scaling == "auto" and len(set(ranks.values())) == 1)
        modules = {
            name: RankAndScale(rank, kept_scale(found[name].scale) if keep else 1.0) for name, rank in ranks.items()
        }
        modules = source.adjusted(modules, exceed=target.budget is None)
        keep = keep and all(new.scale == kept_scale(found[name].scale) for name, new in modules.items())
        if not any(ranks.values()):
            raise ValueError(f"budget={target.budget!r} would drop every module; raise the budget or min_rank.")
        needed = source.overhead(modules)
        if needed <= reserved:
            return modules, keep
        reserved = needed


def _check_gain(found: Mapping[str, _Analysis], target: RankTarget) -> None:
    """Raises a ValueError if no module has a rank above the target rank."""
    largest = max(one.rank for one in found.values())
    if target.rank is not None and target.rank >= largest:
        raise ValueError(
            f"target rank {target.rank} is not smaller than the current rank {largest} for every module; nothing to "
            f"squeeze (use rank < {largest})."
        )


def _check_nested(modules: Mapping[str, RankAndScale]) -> None:
    """Raises if `out_proj` inside an adapted attention layer got another rank or scale than that layer.

    peft matches patterns with the name of the outer layer only.
    """
    nested = [name for name in modules if ".base_layer." in name]
    if nested and len(set(modules.values())) > 1:
        raise NotImplementedError(
            f"{nested[0]} cannot have another rank or scale than the layer around it; use rank=..., the same for all."
        )


def _row(name: str, one: _Analysis, rank: int, output_error: float | None) -> ModuleReport:
    """Report of one module at a new rank."""
    spectrum, svd = one.spectrum, one.svd
    return ModuleReport(
        name=name,
        old_rank=one.rank,
        new_rank=rank,
        energy=svd.energy(rank),
        rel_error=svd.error(rank),
        numerical_rank=svd.rank,
        params_before=one.rank * spectrum.parameters,
        params_after=rank * spectrum.parameters,
        singular_values=tuple(svd.singular_values.tolist()),
        output_error=output_error,
    )


def _warn(report: SqueezeReport) -> None:
    """Warns about untrained modules, and about the worst module if it keeps less than half of its energy."""
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
