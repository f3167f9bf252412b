"""`peft-zoo quantize`: quantizes a saved model to a bit budget, one matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_zoo.cli.shared import Command, Facts, Result, progress_bar, table
from peft_zoo.common.settings import method_options, setting

if TYPE_CHECKING:
    from peft_zoo.merge.lq_lora.checkpoint import UnquantizedSummary
    from peft_zoo.merge.lq_lora.matrix import QuantizedMatrix

EPILOG = """examples:
  peft-zoo quantize Llama-3-8B Llama-3-8B-2.75bit --budget-bits 2.75
  peft-zoo quantize model small --set qconfig=nf4 --set r=16
  peft-zoo quantize model small --budget-bits 3 --importance fisher.safetensors --set weighting=fisher

Every field of LqLoraConfig can be given by --set. The same command continues an interrupted run. Once peft_zoo is
imported, AutoModelForCausalLM.from_pretrained loads OUT, and an LqLoraConfig trains it."""

WORST = 3  # matrices with the largest errors that are listed


@dataclass(frozen=True)
class Flags:
    """Settings of `peft-zoo quantize`."""

    source: str = setting(
        "a folder that transformers saved, in floating point", positional=True, required=True, metavar="IN"
    )
    target: str = setting("a new folder", positional=True, required=True, metavar="OUT")
    budget_bits: float | None = setting("average bits per weight of the quantized matrices")
    importance: str | None = setting("file of save_importance, for --set weighting=fisher", metavar="FILE")
    device: str = setting("device of the decomposition", "cpu")
    no_verify: bool = setting("do not load OUT once in a child process before it is written", False)
    options: dict[str, str] = method_options()


def _config(flags: Flags) -> Any:
    from peft_zoo.tasks.base.methods import build_config

    budget = {} if flags.budget_bits is None else {"budget_bits": str(flags.budget_bits)}
    return build_config("lq_lora", {**flags.options, **budget}, {"target_modules": "all-linear"})


def _plan(flags: Flags) -> Facts:
    from peft_zoo.common.atomic import check_new_folder
    from peft_zoo.io.checkpoint import Checkpoint

    config = _config(flags)
    check_new_folder(Path(flags.target), "OUT")
    with Checkpoint(flags.source) as source:
        size = sum(info.nbytes for info in source.tensors.values())
        facts = {"tensors": f"{len(source.tensors):,} of {size / 1e6:,.1f} MB"}
    chosen = {name: getattr(config, name) for name in ("r", "budget_bits", "qconfig", "weighting")}
    return {**facts, **chosen, "device": flags.device, "output": flags.target}


def _run(flags: Flags) -> Result:
    from peft_zoo.calibration.fisher import load_importance
    from peft_zoo.merge.lq_lora.checkpoint import quantize_checkpoint, unquantized_summary

    config = _config(flags)
    importance = None if flags.importance is None else load_importance(flags.importance)
    more: dict[str, Any] = {"importance": importance, "device": flags.device, "progress": progress_bar}
    more["verify"] = not flags.no_verify
    rows = quantize_checkpoint(flags.source, flags.target, config, **more)
    return _result(rows, unquantized_summary(flags.target), flags)


def _result(rows: Sequence[QuantizedMatrix], unquantized: UnquantizedSummary, flags: Flags) -> Result:
    """Summarizes the bits of all matrices and lists those with the largest errors."""
    total = sum(row.num_weights for row in rows)
    bits = sum(row.bits * row.num_weights for row in rows) / total
    skipped = sum(row.config is None for row in rows)
    before, after = _weight_bytes(flags.source), _weight_bytes(flags.target)
    worst = sorted(rows, key=lambda row: -row.error)[:WORST]
    facts: dict[str, Any] = {
        "matrices": f"{len(rows):,} with {total:,} weights" + (f", {skipped} not quantized" if skipped else ""),
        "bits": f"{bits:.3f} per weight, and a low-rank part of rank {max(row.rank for row in rows)}",
        "unquantized": unquantized,
        "weights": f"{before / 1e6:,.1f} MB → {after / 1e6:,.1f} MB",
        "loses most": [f"{row.error:.4f}  {row.bits:.2f} bits  {row.name}" for row in worst],
    }
    data = {
        "matrices": [
            {name: getattr(row, name) for name in ("name", "bits", "rank", "error")} | {"num_weights": row.num_weights}
            for row in rows
        ],
        "bits": bits,
        "unquantized": asdict(unquantized),
        "bytes_before": before,
        "bytes_after": after,
        "written": flags.target,
    }
    return Result(table({**facts, "written": flags.target}), data)


def _weight_bytes(folder: str) -> int:
    """Returns the size of the safetensors files in a folder."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


COMMAND = Command(
    "quantize a model to a bit budget",
    _run,
    Flags,
    plan=_plan,
    description="Quantize the files of a model as LQ-LoRA does; only one of its matrices is in memory at a time.",
    epilog=EPILOG,
    mistakes=(ValueError, NotImplementedError, OSError, RuntimeError),  # torch: unknown devices
)
