"""`peft-zoo combine`: combines several LoRAs into one, or shows how similar they are."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from peft_zoo.cli.shared import Command, Facts, Result, progress_bar, table
from peft_zoo.common.settings import setting
from peft_zoo.common.values import SettingError

EPILOG = """examples:
  peft-zoo combine style subject -o both --weights 0.7,0.3
  peft-zoo combine new old -o difference --weights 1,-1 --rank 16
  peft-zoo combine math code -o both --method ties --density 0.5 --rank 32
  peft-zoo combine style subject -o both --per-module 'model.layers.[0-7].**=1,0'
  peft-zoo combine math code -o both --base base --weights 0.5,0.5      (of checkpoints that were tuned from one base)
  peft-zoo combine style subject --analyze                              (how similar they are; writes nothing)

cat adds the updates exactly; its rank is the sum of the ranks, or --rank. The base model is not needed."""

LONG_TABLE, SHOWN = 40, 20  # a table of more lines than the first shows the second, unless --all-modules
OWN = ("adapters", "out", "base", "analyze", "all_modules", "per_module")  # no options of the library as they are


@dataclass(frozen=True)
class Flags:
    """Settings of `peft-zoo combine`; None leaves the default of the library."""

    adapters: list[str] = setting(
        "folders that peft saved, or .safetensors files; with --base, folders of checkpoints",
        positional=True,
        required=True,
        metavar="ADAPTER",
    )
    out: str | None = setting("a new folder, or file if the adapters are files", short="-o", metavar="OUT")
    base: str | None = setting("combine whole checkpoints that were tuned from this one", metavar="BASE")
    method: (
        Literal[
            "cat", "linear", "ties", "dare_ties", "dare_linear", "magnitude_prune", "slerp", "orthogonal", "tsv", "iso"
        ]
        | None
    ) = setting("how to combine (default cat, the exact sum)")
    weights: list[float] | None = setting("one number per adapter (default 1 for each)", metavar="X,X")
    per_module: dict[str, str] = setting(
        "weights of the modules that match a pattern; repeatable, the last match counts",
        dict,
        metavar="PATTERN=X,X",
        example="**.v_proj=0.5,0.5",
        unique=True,
    )
    rank: int | None = setting("rank of the result (default: that of the method)")
    space: Literal["auto", "delta", "factors", "knots", "core"] | None = setting(
        "what methods by entry combine: core (default), knots, delta (whole updates) or factors (as peft)"
    )
    density: float | None = setting("share of entries that ties, dare and magnitude_prune keep, in (0, 1]")
    sign: Literal["total", "frequency"] | None = setting("how ties elects signs (default total)")
    seed: int | None = setting("seed of the entries that dare drops (default 0)")
    global_angle: bool = setting("slerp: one angle for all modules", False)
    compress_first: bool = setting("core space: project on --rank directions before combining", False)
    dtype: Literal["float32", "bfloat16", "float16", "adapter"] | None = setting(
        "dtype of the factors (default float32; adapter: the widest of the adapters)"
    )
    drop: list[str] | None = setting(
        "what to leave out: names of modules, modules_to_save, trainable_token_indices, bias, lora_bias, magnitude",
        metavar="NAME,NAME",
    )
    analyze: bool = setting("report cosines, shared spaces and opposite signs of each pair; writes nothing", False)
    all_modules: bool = setting(f"a line for each module even if there are more than {LONG_TABLE}", False)


def _check(flags: Flags) -> None:
    if flags.out is None and not flags.analyze:
        raise SettingError("--out is missing: give a new folder or file, or --analyze to compare the adapters.")
    given = [*_given(flags), *(["per_module"] if flags.per_module else [])]
    given += ["base"] if flags.base else []
    if flags.analyze and (given or flags.out is not None):
        raise SettingError("--analyze only compares the adapters: leave the other flags out.")
    _per_module(flags)


def _given(flags: Flags) -> dict[str, Any]:
    """Returns the flags that are options of the library and have a value."""
    names = [item.name for item in fields(Flags) if item.name not in OWN]
    return {name: value for name in names if (value := getattr(flags, name)) not in (None, False)}


def _per_module(flags: Flags) -> dict[str, list[float]] | None:
    """Returns the weights by pattern, or None."""
    found: dict[str, list[float]] = {}
    for pattern, text in flags.per_module.items():
        try:
            found[pattern] = [float(number) for number in text.split(",")]
        except ValueError as error:
            raise SettingError(f"--per-module {pattern}={text}: give numbers, such as {pattern}=1,0.") from error
    return found or None


def _plan(flags: Flags) -> Facts:
    if flags.analyze:
        return {"adapters": flags.adapters, "output": "none: only a table"}
    if flags.base:
        planned = _combine_checkpoints(flags, dry_run=True).data
        return {"method": planned["method"], "bytes": planned["nbytes"], "output": flags.out}
    from peft_zoo.merge.combining.api import combine_plan

    facts = combine_plan(flags.adapters, str(flags.out), per_module=_per_module(flags), **_given(flags))
    return {name: value for name, value in facts.items() if value != []} | {"output": flags.out}


def _run(flags: Flags) -> Result:
    if flags.analyze:
        from peft_zoo.merge.combining.similarity import analyze

        found = analyze(flags.adapters, progress=progress_bar)
        return Result(found.table(_limit(flags, len(found.pairs))), found.to_dict())
    if flags.base:
        return _combine_checkpoints(flags)
    from peft_zoo.merge.combining.api import combine

    how = {"per_module": _per_module(flags), "progress": progress_bar, **_given(flags)}
    report = combine(flags.adapters, str(flags.out), **how)
    facts: dict[str, Any] = {
        "combined": f"{len(report.modules)} modules of {len(report.adapters)} adapters, {report.method}",
        "error": f"{report.error:.1e}",
        "dropped": list(report.dropped),
        "notes": list(report.warnings),
        "written": flags.out,
    }
    shown = {name: value for name, value in facts.items() if value != []}
    text = f"{report.table(_limit(flags, len(report.modules)))}\n\n{table(shown)}"
    return Result(text, {**report.to_dict(), "written": flags.out})


def _combine_checkpoints(flags: Flags, dry_run: bool = False) -> Result:
    """Combines checkpoints, or only checks them."""
    from peft_zoo.merge.combining.checkpoints import combine_checkpoints

    how = {"per_module": _per_module(flags), "progress": progress_bar, "dry_run": dry_run, **_given(flags)}
    report = combine_checkpoints(str(flags.base), flags.adapters, str(flags.out), **how)
    facts = {
        "combined": f"{len(report.updates)} tensors of {len(report.checkpoints)} checkpoints, {report.method}",
        "written": flags.out,
    }
    text = f"{report.table(_limit(flags, len(report.updates)))}\n\n{table(facts)}"
    return Result(text, {**report.to_dict(), "written": None if dry_run else flags.out})


def _limit(flags: Flags, lines: int) -> int | None:
    """Returns the number of lines of a table that are shown; None for all."""
    return SHOWN if lines > LONG_TABLE and not flags.all_modules else None


COMMAND = Command(
    "combine several LoRAs into one",
    _run,
    Flags,
    _check,
    _plan,
    description="Combine several LoRAs into one, from their files, or show how similar they are.",
    epilog=EPILOG,
)
