"""Report of a merge into a checkpoint: what became of each tensor, as values, JSON or a text table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Action = Literal["merged", "replaced", "added", "removed", "converted", "copied"]

REPORT = "merge_report.json"
UNCHANGED_LIMIT = 0.5
"""Share of elements that rounding may leave unchanged before a merge is reported as mostly lost."""


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor of the checkpoint.

    Attributes:
        key: Name in the files.
        action: `"merged"`: an update was added; `"replaced"`: the adapter has the whole tensor; `"added"`: the base has
            no such tensor; `"removed"`; `"converted"`: only dtype or quantization changed; `"copied"`.
        dtype: Dtype in the result; that in the base for a removed tensor.
        adapters: Names of the adapters that changed it.
        relative_update: Frobenius norm of the change divided by that of the base weight, of at most 64 evenly spaced
            rows; None unless merged.
        unchanged: Share of elements of these rows that the rounding left as they were, in [0, 1]; None unless merged.
        erased: Part of the update that quantizing again lost, `|Q(W') - W'| / |W' - W|`; None unless requantized.

    Examples:
        >>> from peft_zoo.merge import TensorReport
        >>> TensorReport("lm_head.weight", "added", "bfloat16", ("default",)).unchanged is None
        True
    """

    key: str
    action: Action
    dtype: str
    adapters: tuple[str, ...] = ()
    relative_update: float | None = None
    unchanged: float | None = None
    erased: float | None = None


@dataclass(frozen=True)
class MergeReport:
    """Result of `merge_checkpoint`.

    Attributes:
        tensors: What became of every tensor that is not copied, in the order of the files.
        copied: Number of tensors that are copied as they are.
        nbytes: Size of the weights of the result in bytes.
        config_changes: New values of fields of `config.json`, by path such as `"text_config.vocab_size"`.
        warnings: Sentences on what a user should know, such as updates that rounding mostly lost.
        seconds: Wall-clock time; 0 for a dry run.

    Examples:
        >>> from peft_zoo.merge import MergeReport, TensorReport
        >>> row = TensorReport("q_proj.weight", "merged", "bfloat16", ("default",), 0.01, 0.2)
        >>> print(MergeReport((row,), copied=3, nbytes=4096).table())
        q_proj.weight  merged  bfloat16  update 0.0100  unchanged 20.00%
        3 tensors copied, 0.0 MB
    """

    tensors: tuple[TensorReport, ...]
    copied: int
    nbytes: int
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "tensors": [asdict(tensor) for tensor in self.tensors]}

    def table(self, limit: int | None = None) -> str:
        """Text table with a line for each tensor that is not copied, and the totals.

        Args:
            limit: Number of tensors to show, those with the largest updates first; None shows all in order.
        """
        shown = list(self.tensors)
        if limit is not None:
            shown = sorted(shown, key=lambda tensor: -(tensor.relative_update or 0.0))[:limit]
        rows = [_row(tensor) for tensor in shown]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        hidden = len(self.tensors) - len(shown)
        lines += [f"and {hidden} more with smaller updates"] if hidden else []
        return "\n".join([*lines, f"{self.copied} tensors copied, {self.nbytes / 1e6:,.1f} MB"])


def write_report(report: MergeReport, folder: Path) -> None:
    """Writes a report as JSON into a folder."""
    (folder / REPORT).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")


def _row(tensor: TensorReport) -> tuple[str, ...]:
    update = "" if tensor.relative_update is None else f"update {tensor.relative_update:.4f}"
    unchanged = "" if tensor.unchanged is None else f"unchanged {tensor.unchanged:.2%}"
    erased = "" if tensor.erased is None else f"erased {tensor.erased:.2f}"
    return tensor.key, tensor.action, tensor.dtype, update, unchanged, erased
