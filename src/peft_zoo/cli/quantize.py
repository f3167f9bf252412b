"""`peft-zoo quantize`: a model in files, quantized to a budget of bits, one matrix at a time."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft_zoo.cli.shared import pairs, plain_warnings, progress_bar, sentence
from peft_zoo.common.values import SettingError

if TYPE_CHECKING:
    from peft_zoo.merge.lq_lora.checkpoint import UnquantizedSummary
    from peft_zoo.merge.lq_lora.export import QuantizedMatrix

EPILOG = """examples:
  peft-zoo quantize Llama-3-8B Llama-3-8B-2.75bit --budget-bits 2.75
  peft-zoo quantize model small --set qconfig=nf4 --set r=16
  peft-zoo quantize model small --budget-bits 3 --weights fisher.safetensors --set weighting=fisher --set codebook=lloyd

Every field of LqLoraConfig can be given by --set. A run that was killed goes on where it was. OUT is loaded by
AutoModelForCausalLM.from_pretrained once peft_zoo is imported, and trained by an LqLoraConfig."""

WORST = 3  # matrices that are named


def add_parser(commands: Any) -> None:
    """Add the command to the program's.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser(
        "quantize",
        help="quantize a model to a budget of bits",
        description="Quantize a model in files as LQ-LoRA does; only one of its matrices is in memory at a time.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="IN", help="a folder that transformers saved, in floating-point")
    parser.add_argument("target", metavar="OUT", help="a new folder")
    parser.add_argument("--budget-bits", metavar="X", help="average bits of a number in the quantized matrices")
    parser.add_argument("--weights", metavar="FILE", help="file of save_importance, for --set weighting=fisher")
    parser.add_argument("--device", metavar="NAME", default="cpu", help="where matrices are decomposed (default cpu)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a field; repeatable")


def flags() -> list[str]:
    """All flags of the command."""
    return ["--budget-bits", "--weights", "--device", "--set"]


def run(options: argparse.Namespace) -> str:
    """Quantize.

    Returns:
        What to print.

    Raises:
        SettingError: If it cannot be done, in one sentence.
    """
    from peft_zoo.calibration.fisher import load_importance
    from peft_zoo.merge.lq_lora.checkpoint import quantize_checkpoint, unquantized_summary
    from peft_zoo.tasks.base.methods import build_config

    budget = {} if options.budget_bits is None else {"budget_bits": options.budget_bits}
    config: Any = build_config("lq_lora", {**pairs(options.set), **budget}, {"target_modules": "all-linear"}, steps=0)
    with plain_warnings():
        try:
            importance = None if options.weights is None else load_importance(options.weights)
            more: dict[str, Any] = {"importance": importance, "device": options.device, "progress": progress_bar()}
            rows = quantize_checkpoint(options.source, options.target, config, **more)
        except (ValueError, OSError, RuntimeError) as error:
            raise SettingError(sentence(error)) from error
    return _summary(rows, unquantized_summary(options.target), options.source, options.target)


def _summary(rows: Sequence[QuantizedMatrix], unquantized: UnquantizedSummary, source: str, target: str) -> str:
    """The budget as it was spent, and where most was lost."""
    num_weights = sum(row.num_weights for row in rows)
    bits = sum(row.bits * row.num_weights for row in rows) / num_weights
    left = sum(row.config is None for row in rows)
    facts = [
        ("matrices", f"{len(rows):,} with {num_weights:,} weights" + (f", {left} as they were" if left else "")),
        ("bits", f"{bits:.3f} a number, and a part of rank {max(row.rank for row in rows)} beside it"),
        ("as it was", str(unquantized)),
        ("weights", f"{_megabytes(source)} → {_megabytes(target)}"),
    ]
    for place, row in enumerate(sorted(rows, key=lambda row: -row.error)[:WORST]):
        facts.append(("" if place else "loses most", f"{row.error:.4f}  {row.bits:.2f} bits  {row.name}"))
    facts.append(("written", target))
    return "\n".join(f"{key:<12}{value}" for key, value in facts)


def _megabytes(folder: str) -> str:
    """Size of the weights in a folder."""
    size = sum(os.path.getsize(os.path.join(folder, n)) for n in os.listdir(folder) if n.endswith(".safetensors"))
    return f"{size / 1e6:,.1f} MB"
