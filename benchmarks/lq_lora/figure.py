"""Draws perplexity against bits, before and after tuning, from the saved results of `benchmarks.lq_lora.study`.

python -m benchmarks.lq_lora.figure       benchmarks/results/lq_lora_study.json -> docs/methods/lq_lora_bits.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks import common

FIGURE = common.ROOT / "docs" / "methods" / "lq_lora_bits.svg"
BEFORE = ", before tuning"
UNQUANTIZED = 16.0  # bits per weight of a base in bfloat16
COLOURS = {"LQ-LoRA": "tab:blue", "LQ-LoRA (fitted)": "tab:red"}
COLOURS |= {"QLoRA": "tab:orange", "LoftQ": "tab:green", "LoRA": "tab:gray"}


def points(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """Returns (bits, mean perplexity before, after tuning) by method, with the fewest bits first."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for name, row in rows.items():
        if not name.endswith(BEFORE):
            method, _, bits = name.rpartition(" ") if name[-1].isdigit() else (name, "", UNQUANTIZED)
            found.setdefault(method, []).append((float(bits), rows[name + BEFORE]["mean"], row["mean"]))
    return {method: sorted(each) for method, each in found.items()}


def draw(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Writes the figure as SVG: hollow marks before tuning, full marks after it.

    Args:
        rows: The rows of the saved results, by recipe.
        path: The SVG file.
    """
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "the same figure has the same bytes"
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for method, each in points(rows).items():
        bits, before, after = zip(*each, strict=True)
        style = {"color": COLOURS.get(method), "marker": "o", "linewidth": 1}
        axes.plot(bits, before, linestyle=":", markerfacecolor="none", **style)
        axes.plot(bits, after, label=method, **style)
    axes.set(xscale="log", yscale="log", xlabel="bits per weight of the base", ylabel="perplexity")
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
    parser = argparse.ArgumentParser(prog="benchmarks.lq_lora.figure", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--json", type=Path, default=common.RESULTS / "lq_lora_study.json", help="saved results")
    parser.add_argument("--output", type=Path, default=FIGURE, help=f"default {FIGURE.name}")
    options = parser.parse_args(arguments)
    draw(json.loads(options.json.read_text(encoding="utf-8"))["rows"], options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
