"""`peft-zoo extract`: extracts a LoRA from a checkpoint and the one that it was trained from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from peft_zoo.cli.shared import Command, Facts, Result, progress_bar, table
from peft_zoo.common.settings import setting

EPILOG = """examples:
  peft-zoo extract Llama-3-8B my-finetune -o my-lora
  peft-zoo extract Llama-3-8B my-finetune -o my-lora --rank 32 --skip lm_head

Without --rank, --energy, --max-error and --budget each module gets the rank of what is above the rounding noise."""

LONG_TABLE, SHOWN = 40, 20  # a table of more modules than the first shows the second, unless --all-modules
OWN = ("base", "tuned", "out", "all_modules")  # no options of the library as they are


@dataclass(frozen=True)
class Flags:
    """Settings of `peft-zoo extract`; None leaves the default of the library."""

    base: str = setting("folder of the checkpoint to start from", positional=True, required=True, metavar="BASE")
    tuned: str = setting(
        "folder of the checkpoint that was trained from it", positional=True, required=True, metavar="TUNED"
    )
    out: str = setting("a new folder for the LoRA", required=True, short="-o", metavar="OUT")
    rank: int | Literal["auto"] | None = setting("rank of every module, or auto (default): that above the noise")
    energy: float | None = setting("share of squared singular values above the noise that modules keep, in (0, 1]")
    max_error: float | None = setting("largest relative error of an update, in [0, 1)")
    budget: int | str | None = setting("size of all factors (24MB, '8 MiB') or number of parameters", metavar="SIZE")
    skip: list[str] | None = setting("modules to leave out, by name or its end", metavar="NAME,NAME")
    dtype: Literal["float32", "bfloat16", "float16"] | None = setting("dtype of the factors (default float32)")
    all_modules: bool = setting(f"a line for each module even if there are more than {LONG_TABLE}", False)


def _given(flags: Flags) -> dict[str, Any]:
    """Returns the flags that are options of the library and have a value."""
    names = [item.name for item in fields(Flags) if item.name not in OWN]
    return {name: value for name in names if (value := getattr(flags, name)) is not None}


def _plan(flags: Flags) -> Facts:
    from peft_zoo.merge.extract.api import extract_plan

    return {**extract_plan(flags.base, flags.tuned, flags.out, **_given(flags)), "output": flags.out}


def _run(flags: Flags) -> Result:
    from peft_zoo.merge.extract.api import extract_lora

    report = extract_lora(flags.base, flags.tuned, flags.out, progress=progress_bar, **_given(flags))
    facts: dict[str, Any] = {
        "extracted": f"{len(report.modules)} modules, error {report.error:.4f}",
        "saved whole": list(report.saved),
        "skipped": list(report.skipped),
        "notes": list(report.warnings),
        "written": flags.out,
    }
    limit = SHOWN if len(report.modules) > LONG_TABLE and not flags.all_modules else None
    shown = {name: value for name, value in facts.items() if value != []}
    return Result(f"{report.table(limit)}\n\n{table(shown)}", {**report.to_dict(), "written": flags.out})


COMMAND = Command(
    "extract a LoRA from two checkpoints",
    _run,
    Flags,
    None,
    _plan,
    description="Extract a LoRA from a checkpoint and the one that it was trained from.",
    epilog=EPILOG,
)
