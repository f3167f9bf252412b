r"""Combines several LoRAs into one LoRA, from their files and without the base model.

The update of adapter t in a module is ``D_t = s_t B_t A_t``, and zero where the adapter has none. ``combine`` writes
factors of

    cat, linear    sum_t w_t D_t
    others         see `peft_zoo.kernels.combining`

with ranks, targets, scales, rsLoRA and patterns that may differ from adapter to adapter. The result has alpha = r in
every module, so that programs that ignore patterns use the right scale.

Cost: the factors of one module in memory, new ones wait in a temporary file; no matrix of the size of a weight, except
with `space="delta"` for the methods that work entry by entry.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_zoo.common.atomic import check_new_folder, new_folder
from peft_zoo.common.checks import check, make_options
from peft_zoo.common.progress import Progress, silent
from peft_zoo.io.expert_names import is_expert
from peft_zoo.merge.base.factor_file import FactorFile
from peft_zoo.merge.base.plain_lora import Factors, write_factors, write_plain_lora
from peft_zoo.merge.combining.modules import combine_updates, global_cosine
from peft_zoo.merge.combining.options import CombineOptions
from peft_zoo.merge.combining.report import CombineReport
from peft_zoo.merge.combining.sources import Sources, open_sources
from peft_zoo.merge.combining.stacked import ByModule
from peft_zoo.merge.combining.weights import Weights

METADATA = ("modelspec.architecture", "ss_base_model_version", "ss_v2")
"""Metadata of a single file that say which model it is for; they are kept."""


def combine(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    method: str = "cat",
    weights: Sequence[float] | None = None,
    per_module: Mapping[str, Sequence[float]] | None = None,
    rank: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> CombineReport:
    """Combines LoRAs into one LoRA.

    Args:
        adapters: Folders saved by peft, or `.safetensors` files of sd-scripts or diffusers, all in one format.
        out: Folder, or for single files a `.safetensors` file, that does not exist; it appears complete or not at all.
        method: `"cat"` (default) for the exact sum, or another method of `CombineOptions`.
        weights: One number per adapter, negative ones too; default 1 for each. For `"slerp"` two numbers that add to 1,
            default 0.5 each.
        per_module: Other weights by patterns of module names, such as `{"model.layers.[0-7].**": [1, 0]}`, see
            `peft_zoo.merge.combining.weights`; of several patterns that match, the last one counts.
        rank: Rank of the result; None keeps that of the method, which for `"cat"` is the sum of the ranks.
        progress: Wraps the loop over module names, such as a progress bar; None shows nothing.
        **options: Other fields of `CombineOptions`: `space`, `density`, `sign`, `seed`, `global_angle`,
            `compress_first`, `dtype`, `drop`.

    Returns:
        Ranks and errors of every module.

    Raises:
        ValueError: If an argument or file is invalid, or the adapters do not fit each other. Nothing is written then.
        NotImplementedError: If an adapter is no LoRA, or its update is not `s * B A`; export it first.

    Examples:
        >>> import tempfile, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, r in (("a", 4), ("b", 2)):
        ...         config = LoraConfig(r=r, target_modules=["0"], init_lora_weights=False)
        ...         model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config)
        ...         model.save_pretrained(f"{folder}/{name}")
        ...     report = combine([f"{folder}/a", f"{folder}/b"], f"{folder}/sum", weights=[0.7, -0.3])
        >>> report.modules[0].rank, report.error < 1e-6
        (6, True)
    """
    chosen = make_options(CombineOptions, method=method, rank=rank, **options)
    by_module = _weights(len(adapters), weights, per_module, chosen)
    with open_sources(adapters, chosen.drop) as sources:
        target = _check_target(sources, out)
        by_module.check_patterns(sources.modules)
        _check_ranks(sources, chosen)
        angle = global_cosine(sources) if chosen.global_angle else None
        rows = []
        with FactorFile(target.parent) as factors:
            for name in (progress or silent)(list(sources.modules), "combine"):
                for weight, updates in sources.updates(name).items():
                    dtype = chosen.dtype_of(sources.dtypes(name))
                    found = combine_updates(weight, updates, by_module.of(name), chosen, dtype, angle)
                    if found is not None:
                        factors.add(weight, found[1])
                        rows.append(found[0])
                    del found  # one module in memory
            written = ByModule(factors, sources.stacked)
            notes = (*sources.notes, *_zero_notes(sources, written, chosen))
            experts = [name for name in factors if is_expert(name) or name.endswith("]")]
            most = factors.pad(experts)  # peft demands one rank of all experts
            rows = [row.padded(most) if row.name in set(experts) else row for row in rows]
            _write(target, sources, written)
        return CombineReport(chosen.method, chosen.resolved_space, sources.names, tuple(rows), sources.dropped, notes)


def combine_plan(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    per_module: Mapping[str, Sequence[float]] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Checks everything that `combine` checks before it computes, and says what it would combine; writes nothing.

    Arguments and errors are those of `combine`.

    Returns:
        Method, space, weights by adapter, number of modules, and what is left out.
    """
    chosen = make_options(CombineOptions, **options)
    by_module = _weights(len(adapters), weights, per_module, chosen)
    with open_sources(adapters, chosen.drop) as sources:
        _check_target(sources, out)
        by_module.check_patterns(sources.modules)
        _check_ranks(sources, chosen)
        return {
            "method": chosen.method,
            "space": chosen.resolved_space,
            "weights": [f"{name}: {weight:g}" for name, weight in zip(sources.names, by_module.default, strict=True)],
            "modules": len(sources.modules),
            "dropped": list(sources.dropped),
            "notes": list(sources.notes),
        }


def _weights(
    count: int,
    weights: Sequence[float] | None,
    per_module: Mapping[str, Sequence[float]] | None,
    options: CombineOptions,
) -> Weights:
    """Returns the weights by module after checking their number, and what slerp demands of them."""
    default = 0.5 if options.method == "slerp" else 1.0
    found = Weights.of_count(count, "adapters", weights, per_module, default)
    if options.method == "slerp":
        check(count == 2, "adapters", count, "method='slerp' interpolates two adapters")
        for values in (found.default, *found.per_module.values()):
            fits = all(value >= 0 for value in values) and abs(sum(values) - 1) < 1e-9
            check(fits, "weights", list(values), "for method='slerp' use two that are not negative and add to 1")
    return found


def _check_target(sources: Sources, out: str | Path) -> Path:
    """Returns the absolute path of the result after checking that it can be made."""
    target = Path(os.path.abspath(out))
    if sources.adapters[0].config is not None:
        check_new_folder(target, "out")
        return target
    if target.suffix != ".safetensors":
        raise ValueError(f"out={str(out)!r}: the adapters are single files, so give the name of a .safetensors file.")
    if os.path.lexists(target):
        raise ValueError(f"out={str(out)!r} exists; give a new name.")
    return target


def _check_ranks(sources: Sources, options: CombineOptions) -> None:
    """Raises a ValueError if factors cannot be added because their ranks differ."""
    if options.resolved_space != "factors":
        return
    for name in sources.modules:
        ranks = {who: rank for who, rank in zip(sources.names, sources.ranks(name), strict=True) if rank}
        if len(set(ranks.values())) > 1:
            shown = ", ".join(f"r={rank} in {who!r}" for who, rank in ranks.items())
            raise ValueError(f"{name}: {shown}: space='factors' adds factors of one rank; use space='core'.")


def _zero_notes(sources: Sources, written: Collection[str], options: CombineOptions) -> list[str]:
    """Says which modules are left out because nothing is left of them; raises a ValueError if all are."""
    zero = [name for name in sources.modules if name not in written]
    cause = "by their weights, or because the updates are zero or cancel"
    if options.by_entry:
        cause += f", or because density={options.density:g} keeps none of few entries"
    if not written:
        raise ValueError(f"weights: the combination is zero in every module, {cause}; use others.")
    return [f"{len(zero)} modules, such as {zero[0]}, are left out: their combination is zero, {cause}"] if zero else []


def _write(target: Path, sources: Sources, factors: Mapping[str, Factors]) -> None:
    """Writes a folder, or a file in the format of the adapters."""
    first = sources.adapters[0]
    if first.config is not None:
        with new_folder(target, "out") as folder:
            write_plain_lora(folder, sources.config, sources.all_modules, factors, sources.fan_in_fan_out)
        return
    # Without alphas every reader takes alpha = r, which the scale of 1 is.
    metadata = {"format": "pt", **{key: text for key, text in first.file.metadata.items() if key in METADATA}}
    write_factors(target, sources.modules, factors, metadata, sources.format)
