"""Bits against perplexity, before and after tuning: the picture of what `benchmarks.lq_lora.study` has saved.

python -m benchmarks.lq_lora.picture       benchmarks/results/lq_lora_study.json -> docs/methods/lq_lora_bits.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks import common

PICTURE = common.ROOT / "docs" / "methods" / "lq_lora_bits.svg"
BEFORE = ", before tuning"
UNQUANTIZED = 16.0  # bits of a base that is left in bfloat16
COLOURS = {"LQ-LoRA": "tab:blue", "LQ-LoRA (fitted)": "tab:red"}
COLOURS |= {"QLoRA": "tab:orange", "LoftQ": "tab:green", "LoRA": "tab:gray"}


def points(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """Of each method bits, and mean perplexities before and after tuning, fewest bits first."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for name, row in rows.items():
        if not name.endswith(BEFORE):
            method, _, bits = name.rpartition(" ") if name[-1].isdigit() else (name, "", UNQUANTIZED)
            found.setdefault(method, []).append((float(bits), rows[name + BEFORE]["mean"], row["mean"]))
    return {method: sorted(each) for method, each in found.items()}


def draw(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write the picture: hollow marks before tuning, full ones after it."""
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "the same picture has the same bytes"
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for method, each in points(rows).items():
        bits, before, after = zip(*each, strict=True)
        style = {"color": COLOURS.get(method), "marker": "o", "linewidth": 1}
        axes.plot(bits, before, linestyle=":", markerfacecolor="none", **style)
        axes.plot(bits, after, label=method, **style)
    axes.set(xscale="log", yscale="log", xlabel="bits of a number in the base", ylabel="perplexity")
    axes.set_xticks([2.5, 3, 4, 6, 8, 16])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_yticks([6, 8, 10, 20, 50, 100, 200, 500])
    axes.grid(alpha=0.3)
    axes.legend(title="after tuning; dotted: before")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.lq_lora.picture", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--json", type=Path, default=common.RESULTS / "lq_lora_study.json", help="what was saved")
    parser.add_argument("--output", type=Path, default=PICTURE, help=f"default {PICTURE.name}")
    options = parser.parse_args(arguments)
    draw(json.loads(options.json.read_text(encoding="utf-8"))["rows"], options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
