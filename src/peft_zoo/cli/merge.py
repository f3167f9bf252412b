"""`peft-zoo merge`: merges adapters into the files of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft_zoo.cli.shared import Command, Facts, Result, progress_bar, table
from peft_zoo.common.settings import setting
from peft_zoo.common.values import SettingError

if TYPE_CHECKING:
    from peft_zoo.merge import MergeReport

EPILOG = """examples:
  peft-zoo merge Llama-3-8B my-adapter -o Llama-3-8B-mine
  peft-zoo merge base style subject --weight style=0.7 -o both
  peft-zoo merge base-nf4 adapter --quantized dequantize -o merged
  peft-zoo merge stable-diffusion-xl my-style -o sdxl-my-style

Adapters of every type that peft or peft-zoo can merge. The same command continues an interrupted run.
BASE may be a pipeline of diffusers: ADAPTER then has folders named by component, such as unet and text_encoder, or is
for one of them."""

SHOWN = 5  # tensors with the largest updates that are listed


@dataclass(frozen=True)
class Flags:
    """Settings of `peft-zoo merge`; None leaves the default of the library."""

    base: str = setting("folder of a model or pipeline", positional=True, required=True, metavar="BASE")
    adapters: list[str] = setting("folders of adapters", positional=True, required=True, metavar="ADAPTER")
    output: str = setting("a new folder", required=True, short="-o", metavar="DIR")
    weight: dict[str, str] = setting(
        "factor of an adapter's update; repeatable", dict, metavar="ADAPTER=X", example="style=0.7", unique=True
    )
    dtype: Literal["keep", "float32", "bfloat16", "float16"] | None = setting("dtype of all tensors (default keep)")
    rounding: Literal["nearest", "stochastic"] | None = setting("rounding of merged weights (default nearest)")
    seed: int | None = setting("seed of stochastic rounding (default 0)")
    tied: Literal["auto", "share", "refuse"] | None = setting(
        "tied embeddings that would differ: auto: untie (default); share: change both; refuse"
    )
    vocab: Literal["auto", "adapter"] | None = setting(
        "rows of embeddings beyond the adapter's tokens: auto: keep (default); adapter: cut"
    )
    quantized: Literal["refuse", "dequantize", "requantize", "simulate:nf4", "simulate:fp4"] | None = setting(
        "what to do with a quantized base (default refuse)"
    )
    arithmetic: Literal["exact", "peft"] | None = setting("exact: float32, rounded once (default); peft: its bits")
    max_shard_bytes: int | None = setting("size of the files of the result (default: those of the base)")
    readers: int | None = setting("modules that are computed at a time (default 2)")
    in_memory: bool = setting("load the whole base, for types whose layers are made from its weights", False)
    all_tensors: bool = setting(
        f"a line for each changed tensor instead of the {SHOWN} with the largest updates", False
    )


OWN = ("base", "adapters", "output", "weight", "all_tensors")


def _merge(flags: Flags, dry_run: bool = False) -> MergeReport:
    from peft_zoo.merge import merge_checkpoint

    options = {item.name: getattr(flags, item.name) for item in fields(Flags) if item.name not in OWN}
    given: dict[str, Any] = {name: value for name, value in options.items() if value not in (None, False)}
    weights = {name: _number(name, text) for name, text in flags.weight.items()} or None
    more: dict[str, Any] = {"dry_run": dry_run, "progress": progress_bar}
    return merge_checkpoint(flags.base, flags.adapters, flags.output, weights=weights, **more, **given)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise SettingError(f"--weight cannot be '{name}={text}': give a number, for example {name}=0.7.") from error


def _check(flags: Flags) -> None:
    for name, text in flags.weight.items():
        _number(name, text)


def _plan(flags: Flags) -> Facts:
    report = _merge(flags, dry_run=True)
    return {**_facts(report), "changes": [f"{row.action}  {row.key}" for row in report.tensors], "output": flags.output}


def _facts(report: MergeReport) -> dict[str, Any]:
    changes = [f"{path} = {value}" for path, value in report.config_changes.items()]
    facts: dict[str, Any] = {
        "tensors": f"{len(report.tensors):,} changed, {report.copied:,} copied, {report.nbytes / 1e6:,.1f} MB",
    }
    return {**facts, **({"config.json": changes} if changes else {})}


def _run(flags: Flags) -> Result:
    report = _merge(flags)
    shown: Sequence[str] = report.table(None if flags.all_tensors else SHOWN).splitlines()[:-1]
    facts = {
        **_facts(report),
        "time": f"{report.seconds:,.1f} s",
        **({"warning": list(report.warnings)} if report.warnings else {}),
        "written": flags.output,
    }
    return Result("\n".join([*shown, "", table(facts)]), {**report.to_dict(), "written": str(Path(flags.output))})


COMMAND = Command(
    "merge adapters into the files of a model",
    _run,
    Flags,
    _check,
    _plan,
    description="Merge adapters into the files of a model, one module at a time, without loading the model.",
    epilog=EPILOG,
)
