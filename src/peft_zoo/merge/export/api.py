r"""Writes any adapter as a plain LoRA that peft, vLLM and other programs load without peft-zoo.

An update that is a product of two factors is written as it is; any other one becomes its best approximation of a rank,

    Delta W ~ B A = U_r S_r V_r^T        error |Delta W - B A|_F / |Delta W|_F, computed from the stored factors

by the theorem of Eckart and Young, for the rank, error, energy or size that the caller asks for. Nothing is
approximated without being asked for. The scale is multiplied into B, so alpha equals the rank in every module, and
programs that ignore patterns use the right scale.

Cost: one module in memory at a time, and the new factors. An update without factors is formed as a matrix; sides above
512 are decomposed by `peft_zoo.kernels.low_rank.certified` in some products with thin blocks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from peft_zoo.common.atomic import check_new_folder, new_folder
from peft_zoo.common.checks import make_options
from peft_zoo.common.progress import Progress, silent
from peft_zoo.io.expert_names import check_plain_names
from peft_zoo.merge.base.plain_lora import check_drop, write_plain_lora
from peft_zoo.merge.export.fit import fit_all
from peft_zoo.merge.export.opening import open_source
from peft_zoo.merge.export.options import ExportOptions
from peft_zoo.merge.export.report import ExportReport
from peft_zoo.merge.export.source import UpdateSource
from peft_zoo.merge.export.verify import verify_with_stock_peft
from peft_zoo.merge.export.vllm import DEFAULT_RANK, check_vllm, needed_rank


def export_lora(
    adapter: str | Path | nn.Module,
    out: str | Path,
    *,
    base: str | Path | nn.Module | None = None,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    budget: int | str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> ExportReport:
    """Writes an adapter as a plain LoRA for stock peft or vLLM.

    Args:
        adapter: Folder of a saved adapter, or a `PeftModel` whose active adapter is exported.
        out: A folder that does not exist or is empty; it appears complete or not at all.
        base: The base model, or its folder, for a type whose update or the sizes of whose layers depend on it. Weights
            are read only if the update depends on them, one module at a time.
        rank: Largest rank of a module. At most one of `rank`, `energy`, `max_error` and `budget` is given; none: the
            updates are exact.
        energy: Share of the squared singular values that every module keeps, in (0, 1].
        max_error: Largest relative error of an update in the Frobenius norm, in [0, 1).
        budget: Total of all factors: an int in parameters, or a size such as `"24MB"`.
        progress: Wraps the loop over module names, such as a progress bar; None shows nothing.
        **options: Other fields of `ExportOptions`: `per_layer`, `rank_multiple_of`, `dtype`, `target`, `drop`,
            `moments`, `verify`, `trust_patterns`.

    Returns:
        Rank and error of every module.

    Raises:
        ValueError: If an argument or file is invalid, the update has no exact LoRA and no rank was asked for, or the
            adapter has what a LoRA cannot hold and `drop` does not name it. Nothing is written then.
        NotImplementedError: If the adapter's type changes no weights of layers.

    Examples:
        >>> import tempfile, torch
        >>> from peft import PeftModel, get_peft_model
        >>> from peft_zoo import SnellConfig
        >>> config = SnellConfig(r=4, target_modules=["0"], init_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 16)), config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(f"{folder}/snell")
        ...     report = export_lora(f"{folder}/snell", f"{folder}/lora", rank=12, verify=False)
        ...     lora = PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(32, 16)), f"{folder}/lora")
        >>> lora.peft_config["default"].r, 0 < report.error < 0.5
        (12, True)
    """
    chosen = make_options(ExportOptions, rank=rank, energy=energy, max_error=max_error, budget=budget, **options)
    target = Path(os.path.abspath(out))
    check_new_folder(target, "out")
    with open_source(adapter, base, chosen) as source:
        names = _modules(source, chosen)
        fits = fit_all(source, names, chosen, progress or silent)
        with new_folder(target, "out") as work:
            factors = {name: fit.factors for name, fit in fits.items()}
            write_plain_lora(work, source.config, source.modules, factors, source.fan_in_fan_out)
            notes = [*source.notes, *_check_target(work, chosen, max(fit.row.rank for fit in fits.values()))]
            if chosen.verify:
                verify_with_stock_peft(work, source.modules, fits)
    rows = tuple(fit.row for fit in fits.values())
    dropped = tuple(sorted({*source.extras, *(set(source.modules) - set(names))}))
    return ExportReport(source.peft_type, chosen.target, rows, dropped, tuple(notes), chosen.verify)


def export_plan(
    adapter: str | Path | nn.Module,
    out: str | Path,
    *,
    base: str | Path | nn.Module | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Checks everything that `export_lora` checks before it computes, and says what it would export; writes nothing.

    Arguments and errors are those of `export_lora`.

    Returns:
        Type of the adapter, what can be exported, number of modules, and what sets the ranks.
    """
    chosen = make_options(ExportOptions, **options)
    check_new_folder(Path(os.path.abspath(out)), "out")
    with open_source(adapter, base, chosen) as source:
        names = _modules(source, chosen)
        dropped = sorted({*source.extras, *(set(source.modules) - set(names))})
        unasked = "those of the adapter" if source.exact else "not given: give rank, energy, max_error or budget"
        return {
            "type": source.peft_type,
            "exact": source.exact,
            "modules": len(names),
            "ranks": f"{chosen.chosen}={getattr(chosen, chosen.chosen)}" if chosen.chosen else unasked,
            "dropped": dropped,
            "notes": list(source.notes),
        }


def _modules(source: UpdateSource, options: ExportOptions) -> list[str]:
    """Returns the modules to export; raises for what a LoRA cannot hold and `drop` does not name."""
    check_drop(options.drop, source.modules, source.extras)
    names = [name for name in source.modules if not options.drops(name)]
    check_plain_names(names, source.config)
    nested = next((name for name in names if ".base_layer." in name), None)
    if nested is not None:
        raise NotImplementedError(f"{nested}: a layer inside of an adapted attention layer is not supported; drop it.")
    return names


def _check_target(folder: Path, options: ExportOptions, rank: int) -> list[str]:
    """Checks the rules of the program that the LoRA is for; returns what its user must do. `rank` is the largest."""
    if options.target != "vllm":
        return []
    problems = check_vllm(folder)
    if problems:
        raise ValueError(f"target='vllm': {problems[0]}")
    needed = needed_rank(rank)
    return [f"start vLLM with --max-lora-rank {needed}"] if needed is not None and needed > DEFAULT_RANK else []
