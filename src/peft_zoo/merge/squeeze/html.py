"""HTML report of a squeeze: summary, ranks of all modules, and the singular values of each as SVG plots."""

from __future__ import annotations

import math
from collections.abc import Iterable

from markupsafe import Markup, escape

from peft_zoo.common.html import Plot, Section, render_page
from peft_zoo.merge.squeeze.report import ModuleReport, SqueezeReport

POINTS = 64  # singular values drawn for one module
ALL_POINTS = 20_000  # singular values drawn for all modules, so that the page of a large model stays below 2 MB
FEWEST_POINTS = 8  # singular values drawn for one module, however many modules there are
DECADES = 6  # range of the logarithmic axis; smaller values are drawn at its lower end
COLUMN = 48  # largest width of a column in the chart of ranks, in SVG units

_SCALINGS = {
    "keep": "kept, so that alpha follows the rank",
    "fold": "folded into the factors, so that alpha equals the rank",
}
_SCORES = {
    "absolute": "the updates",
    "relative": "the updates, divided by the norm of the module's base weight",
    "activation": "the outputs of the updates on calibration data",
}


def squeeze_html(report: SqueezeReport, title: str) -> str:
    """Renders a report as one self-contained HTML page; equal reports give equal bytes.

    Args:
        report: Report of `squeeze_adapter` or `squeeze_model`.
        title: Heading and title of the page.

    Returns:
        The page as text; texts from the report are escaped.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_zoo.merge import squeeze_html, squeeze_model
        >>> config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config)
        >>> page = squeeze_html(squeeze_model(model, rank=6), "my adapter")
        >>> "1 module went from 256 to 192 parameters" in page
        True
    """
    modules = report.modules
    share = report.params_after / report.params_before
    lead = (
        f"{_count(len(modules), 'module')} went from {report.params_before:,} to {report.params_after:,} parameters "
        f"({share:.1%}) with a relative error of {report.rel_error:.4f}."
    )
    limit = min(POINTS, max(FEWEST_POINTS, ALL_POINTS // len(modules)))
    legend = (
        "From the largest to the smallest on a logarithmic axis that all modules share; filled dots are kept, hollow "
        f"ones dropped. Zeros, and values over {DECADES} powers of ten below the largest, are drawn at the lower end."
    )
    if any(len(module.singular_values) > limit for module in modules):
        legend += f" At most {limit} values of a module are drawn; its caption says how many were skipped."
    plot = _spectrum_plot(modules)
    columns = "A column for each module, in the order of the adapter: the old rank, and in front of it the new one."
    return render_page(
        title,
        lead,
        [
            Section("Summary", rows=_summary(report)),
            Section("Ranks", plot=_rank_chart(modules), note=columns),
            Section("Singular values", note=legend, figures=[_spectrum(plot, module, limit) for module in modules]),
        ],
    )


def _summary(report: SqueezeReport) -> list[tuple[str, str]]:
    """Rows of the summary table."""
    modules, worst = report.modules, report.worst
    rows = [
        ("modules", f"{len(modules):,}"),
        ("ranks", f"{_span(m.old_rank for m in modules)} → {_span(m.new_rank for m in modules)}"),
        ("parameters", f"{report.params_before:,} → {report.params_after:,}"),
        ("energy kept", f"{1 - report.rel_error**2:.2%}"),
        ("relative error", f"{report.rel_error:.4f}"),
        ("largest error", f"{worst.name}, {worst.rel_error:.4f}"),
        ("error measured on", _SCORES[report.score]),
        ("scales", _SCALINGS[report.scaling]),
    ]
    dropped = sum(module.new_rank == 0 for module in modules)
    untrained = sum(module.untrained for module in modules)
    rows += [("dropped", _count(dropped, "module"))] if dropped else []
    rows += [("untrained (B = 0)", _count(untrained, "module"))] if untrained else []
    return rows


def _rank_chart(modules: tuple[ModuleReport, ...]) -> Markup:
    """Old and new rank of each module as columns."""
    largest = max(module.old_rank for module in modules)
    plot = Plot(720, 180, 0, largest)
    slot = min((plot.x(1) - plot.x(0)) / len(modules), COLUMN)

    def bar(kind: str, x: float, rank: int) -> str:
        y = plot.y(rank)
        return f'<rect class="{kind}" x="{x}" y="{y}" width="{slot * 0.8:.2f}" height="{plot.y(0) - y:.1f}"/>'

    shapes = []
    for place, module in enumerate(modules):
        x, label = round(plot.x(0) + place * slot, 2), escape(f"{module.name}: {_change(module)}")
        bars = bar("faint", x, module.old_rank) + bar("main", x, module.new_rank)
        shapes.append(f"<g><title>{label}</title>{bars}</g>")
    return plot.svg("Ranks of all modules", [(0, "0"), (largest, str(largest))], "".join(shapes))


def _spectrum_plot(modules: Iterable[ModuleReport]) -> Plot:
    """Empty plot with a vertical axis in powers of ten that covers the singular values of all modules."""
    exponents = [math.log10(value) for module in modules for value in module.singular_values if value > 0] or [0.0]
    high = math.ceil(max(exponents))
    low = math.floor(max(min(exponents), max(exponents) - DECADES))
    return Plot(220, 120, min(low, high - 1), high)


def _spectrum(plot: Plot, module: ModuleReport, limit: int) -> tuple[Markup, list[str]]:
    """Plot of one module's singular values, and the lines of its caption."""
    values = module.singular_values
    step = math.ceil(len(values) / limit)
    dots: dict[str, list[str]] = {"main": [], "second": []}
    for index in range(0, len(values), step):
        x, y = plot.x((index + 0.5) / len(values)), plot.y(math.log10(values[index]) if values[index] > 0 else plot.low)
        dots["main" if index < module.new_rank else "second"].append(f'<circle cx="{x:g}" cy="{y:g}" r="2"/>')
    shapes = [f'<g class="{kind}">{"".join(drawn)}</g>' for kind, drawn in dots.items()]
    if module.new_rank < len(values):
        x = plot.x(module.new_rank / len(values))
        shapes.append(f'<line class="cut" x1="{x}" x2="{x}" y1="{plot.y(plot.high)}" y2="{plot.y(plot.low)}"/>')
    exponents = range(int(plot.high), int(plot.low) - 1, -math.ceil((plot.high - plot.low) / 3))
    facts = [_change(module), f"error {module.rel_error:.4f}"]
    facts += ["untrained"] if module.untrained else []
    facts += [f"error of outputs {module.output_error:.4f}"] if module.output_error is not None else []
    facts += [f"1 of {step} values drawn"] if step > 1 else []
    label = f"{len(values)} singular values of {module.name} from {values[0]:.3g} to {values[-1]:.3g}"
    grid = [(exponent, f"{10.0**exponent:g}") for exponent in exponents]
    return plot.svg(label, grid, "".join(shapes)), [module.name, " · ".join(facts)]


def _change(module: ModuleReport) -> str:
    """Old and new rank as text."""
    return f"rank {module.old_rank} → {module.new_rank}" + ("" if module.new_rank else ", dropped")


def _span(values: Iterable[int]) -> str:
    """Smallest and largest value as text."""
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _count(count: int, noun: str) -> str:
    """Text of a count with its noun in singular or plural."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
