"""`peft-zoo export`: writes any adapter as a plain LoRA for stock peft or vLLM."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from peft_zoo.cli.shared import Command, Facts, Result, progress_bar, table
from peft_zoo.common.settings import setting
from peft_zoo.common.values import SettingError

EPILOG = """examples:
  peft-zoo export my_snell -o my_lora --rank 16
  peft-zoo export my_dora -o my_lora --base Llama-3-8B --max-error 0.1
  peft-zoo export my_adalora -o my_lora --target vllm

An adapter whose update is a product of two factors leaves exactly, at its own rank. For any other one, one of --rank,
--energy, --max-error and --budget says how well; without it the errors of some ranks are listed and nothing is written.
"""

LONG_TABLE, SHOWN = 40, 20  # a table of more modules than the first shows the second, unless --all-modules
OWN = ("adapter", "out", "shared_error", "no_verify", "all_modules", "moments")  # no options of the library as they are


@dataclass(frozen=True)
class Flags:
    """Settings of `peft-zoo export`; None leaves the default of the library."""

    adapter: str = setting("folder of an adapter", positional=True, required=True, metavar="ADAPTER")
    out: str = setting("a new folder for the LoRA", required=True, short="-o", metavar="OUT")
    base: str | None = setting("folder of the base model, for types whose update or sizes depend on it", metavar="DIR")
    rank: int | None = setting("largest rank of a module")
    energy: float | None = setting("share of squared singular values that every module keeps, in (0, 1]")
    max_error: float | None = setting("largest relative error of an update, in [0, 1)")
    budget: int | str | None = setting("size of all factors (24MB, '8 MiB') or number of parameters", metavar="SIZE")
    shared_error: bool = setting("let --max-error hold for all updates together", False)
    rank_multiple_of: int | None = setting("round ranks up to multiples of this (default 1)")
    dtype: Literal["adapter", "float32", "bfloat16", "float16"] | None = setting(
        "dtype of the factors (default: that of the adapter)"
    )
    target: Literal["peft", "vllm"] | None = setting("program that loads the LoRA (default peft)")
    drop: list[str] | None = setting(
        "what to leave out: names of modules, modules_to_save, trainable_token_indices, bias, lora_bias, magnitude",
        metavar="NAME,NAME",
    )
    moments: str | None = setting(
        "second moments of inputs, from save_moments: minimizes the error of outputs", metavar="FILE"
    )
    trust_patterns: bool = setting("run regular expressions of the adapter's configuration", False)
    no_verify: bool = setting("do not load OUT once with stock peft in a child process before it is written", False)
    all_modules: bool = setting(f"a line for each module even if there are more than {LONG_TABLE}", False)


def _check(flags: Flags) -> None:
    if flags.shared_error and flags.max_error is None:
        raise SettingError("--shared-error is for --max-error: give that too, or leave it out.")


def _options(flags: Flags) -> dict[str, Any]:
    """Returns the keyword arguments of `export_lora`."""
    names = [item.name for item in fields(Flags) if item.name not in OWN]
    found = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    if flags.moments is not None:
        from peft_zoo.calibration.moments import load_moments

        found["moments"] = load_moments(flags.moments)
    return {**found, "per_layer": not flags.shared_error, "verify": not flags.no_verify}


def _plan(flags: Flags) -> Facts:
    from peft_zoo.merge.export.api import export_plan

    facts = export_plan(flags.adapter, flags.out, **_options(flags))
    return {name: value for name, value in facts.items() if value != []} | {"output": flags.out}


def _run(flags: Flags) -> Result:
    from peft_zoo.merge.export.api import export_lora

    report = export_lora(flags.adapter, flags.out, progress=progress_bar, **_options(flags))
    facts: dict[str, Any] = {
        "type": f"{report.peft_type}, {'exact' if report.exact else f'error {report.error:.4f}'}",
        "loses most": f"{report.worst.name}, error {report.worst.error:.4f}",
        "dropped": list(report.dropped),
        "notes": list(report.warnings),
        "checked": "with stock peft" if report.verified else "no",
        "written": flags.out,
    }
    limit = SHOWN if len(report.modules) > LONG_TABLE and not flags.all_modules else None
    shown = {name: value for name, value in facts.items() if value != []}
    return Result(f"{report.table(limit)}\n\n{table(shown)}", {**report.to_dict(), "written": flags.out})


COMMAND = Command(
    "write any adapter as a plain LoRA",
    _run,
    Flags,
    _check,
    _plan,
    description="Write any adapter as a plain LoRA for stock peft or vLLM, with the error of every module.",
    epilog=EPILOG,
)
