"""A compression on one page: what was lost where, and every module's singular values, kept and dropped, as inline SVG.

The page is one file without scripts, fonts or links, so it opens without a network and can be mailed. The same report
gives the same bytes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass

from peft_zoo.merge.squeeze.report import ModuleReport, SqueezeReport

POINTS = 64  # values drawn of one spectrum
ALL_POINTS = 20_000  # values drawn of all spectra, so that the page of a large model stays below 2 MB
FEWEST_POINTS = 8  # values drawn of one spectrum, however many there are
DECADES = 6  # what is smaller than the largest value by more than this is drawn at the bottom

_WIDTH, _HEIGHT = 220, 120  # of a spectrum, in SVG units
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 6, 8, 8  # margins around its plot
_CHART_WIDTH, _CHART_HEIGHT, _COLUMN = 720, 180, 48  # of the chart of ranks, and its widest column

_SCALES = {
    "keep": "kept, so that alpha follows the rank",
    "fold": "folded into the factors, so that alpha equals the rank",
}
_SCORES = {
    "absolute": "the updates themselves",
    "relative": "the updates, in units of the norm of the module's weight",
    "activation": "the outputs of the updates on calibration data",
}

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --kept: #1d4ed8; --dropped: #6b7280; --old: #8886; --grid: #8884; }}
@media (prefers-color-scheme: dark) {{ :root {{ --kept: #7dabff; --dropped: #9ca3af; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }}
h1, td, figcaption {{ overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; width: 100%; margin: 0 0 1.5rem; }}
th, td {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--grid); vertical-align: top; }}
th {{ font-weight: 500; width: 30%; }}
td, figcaption {{ font-variant-numeric: tabular-nums; }}
.spectra {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }}
figcaption {{ font-size: 13px; line-height: 1.35; }}
svg {{ width: 100%; height: auto; }}
svg text {{ font: 10px system-ui, sans-serif; fill: currentColor; text-anchor: end; }}
line {{ stroke: var(--grid); }}
.cut {{ stroke: currentColor; stroke-dasharray: 3 3; }}
.old {{ fill: var(--old); }}
.new, .kept {{ fill: var(--kept); }}
.dropped {{ fill: none; stroke: var(--dropped); }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{lead}</p>
<h2>Summary</h2>
{summary}
<h2>Ranks</h2>
{ranks}
<p>A column for each module, in the order of the adapter: the rank it had, and in front of it the rank it has now.</p>
<h2>Singular values</h2>
<p>{legend}</p>
<div class="spectra">
{spectra}
</div>
</body>
</html>
"""


def squeeze_html(report: SqueezeReport, title: str) -> str:
    """The report as one self-contained page; every text from outside is escaped.

    Args:
        report: What `squeeze_adapter` or `squeeze_model` returned.
        title: Heading and title of the page.
    """
    axis = _axis(report.modules)
    limit = min(POINTS, max(FEWEST_POINTS, ALL_POINTS // len(report.modules)))
    return _PAGE.format(
        title=html.escape(title),
        lead=html.escape(_lead(report)),
        summary=_table(_summary(report)),
        ranks=_rank_chart(report.modules),
        legend=html.escape(_legend(report.modules, limit)),
        spectra="\n".join(_figure(number, module, axis, limit) for number, module in enumerate(report.modules)),
    )


def _lead(report: SqueezeReport) -> str:
    share = report.params_after / report.params_before
    return (
        f"{_count(len(report.modules), 'module')} went from {report.params_before:,} to {report.params_after:,} "
        f"parameters ({share:.1%}) with a relative error of {report.rel_error:.4f}."
    )


def _summary(report: SqueezeReport) -> list[tuple[str, str]]:
    """Facts by name."""
    modules, worst = report.modules, report.worst
    rows = [
        ("modules", f"{len(modules):,}"),
        ("ranks", f"{_span(m.old_rank for m in modules)} → {_span(m.new_rank for m in modules)}"),
        ("parameters", f"{report.params_before:,} → {report.params_after:,}"),
        ("energy kept", f"{1 - report.rel_error**2:.2%}"),
        ("relative error", f"{report.rel_error:.4f}"),
        ("loses most", f"{worst.name}, with an error of {worst.rel_error:.4f}"),
        ("error measured on", _SCORES.get(report.score, report.score)),
        ("scales", _SCALES.get(report.scaling, report.scaling)),
    ]
    dropped = sum(module.new_rank == 0 for module in modules)
    untrained = sum(module.untrained for module in modules)
    rows += [("dropped", _count(dropped, "module"))] if dropped else []
    rows += [("untrained (B = 0)", _count(untrained, "module"))] if untrained else []
    return rows


def _legend(modules: Iterable[ModuleReport], limit: int) -> str:
    strided = any(len(module.singular_values) > limit for module in modules)
    return (
        "From the largest to the smallest on a logarithmic axis that all modules share; filled dots are kept, hollow "
        f"ones dropped. Zeros, and what is more than {DECADES} powers of ten below the largest, are drawn at the "
        "bottom."
    ) + (f" At most {limit} values of a module are drawn; its caption says how many were passed over." * strided)


def _rank_chart(modules: tuple[ModuleReport, ...]) -> str:
    """Old and new ranks as an SVG element, a column for each module."""
    bottom, plot = _CHART_HEIGHT - _BOTTOM, _CHART_HEIGHT - _BOTTOM - _TOP
    largest = max(module.old_rank for module in modules)
    slot = min((_CHART_WIDTH - _LEFT - _RIGHT) / len(modules), _COLUMN)

    def bar(kind: str, x: float, rank: int) -> str:
        height = round(rank / largest * plot, 1)
        return f'<rect class="{kind}" x="{x}" y="{bottom - height:.1f}" width="{slot * 0.8:.2f}" height="{height}"/>'

    parts = [_grid_line(_CHART_WIDTH, round(bottom - rank / largest * plot, 1), str(rank)) for rank in (0, largest)]
    for place, module in enumerate(modules):
        x = round(_LEFT + place * slot, 2)
        label = html.escape(f"{module.name}: {_change(module)}")
        parts.append(f"<g><title>{label}</title>{bar('old', x, module.old_rank)}{bar('new', x, module.new_rank)}</g>")
    change = f"{_span(m.old_rank for m in modules)} before, {_span(m.new_rank for m in modules)} now."
    return _svg("ranks", (_CHART_WIDTH, _CHART_HEIGHT), ("Ranks of all modules", f"Ranks: {change}"), parts)


@dataclass(frozen=True)
class _LogAxis:
    """A logarithmic axis between two powers of ten, upwards in a spectrum."""

    low: int
    high: int

    def place(self, value: float) -> float:
        """Height of a value in SVG units; what is below the axis, zero too, lies on its lower end."""
        exponent = max(math.log10(value), self.low) if value > 0 else self.low
        return round(_TOP + (self.high - exponent) / (self.high - self.low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    def grid(self) -> list[str]:
        """Lines at two to four powers of ten."""
        step = math.ceil((self.high - self.low) / 3)
        exponents = range(self.high, self.low - 1, -step)
        return [_grid_line(_WIDTH, self.place(10.0**exponent), f"{10.0**exponent:g}") for exponent in exponents]


def _axis(modules: Iterable[ModuleReport]) -> _LogAxis:
    """The axis on which all singular values have a place."""
    exponents = [math.log10(value) for module in modules for value in module.singular_values if value > 0] or [0.0]
    high = math.ceil(max(exponents))
    low = math.floor(max(min(exponents), max(exponents) - DECADES))
    return _LogAxis(min(low, high - 1), high)


def _figure(number: int, module: ModuleReport, axis: _LogAxis, limit: int) -> str:
    """One module's spectrum and what became of it."""
    values = module.singular_values
    width, step = _WIDTH - _LEFT - _RIGHT, math.ceil(len(values) / limit)
    dots: dict[str, list[str]] = {"kept": [], "dropped": []}
    for index in range(0, len(values), step):
        x = round(_LEFT + (index + 0.5) / len(values) * width, 1)
        dot = f'<circle cx="{x:g}" cy="{axis.place(values[index]):g}" r="2"/>'
        dots["kept" if index < module.new_rank else "dropped"].append(dot)
    parts = axis.grid() + [f'<g class="{kind}">{"".join(drawn)}</g>' for kind, drawn in dots.items()]
    if module.new_rank < len(values):
        x = round(_LEFT + module.new_rank / len(values) * width, 1)
        parts.append(f'<line class="cut" x1="{x:g}" x2="{x:g}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
    kept = min(module.new_rank, len(values))
    texts = module.name, f"{len(values)} values from {values[0]:.3g} to {values[-1]:.3g}, the first {kept} kept."
    facts = [_change(module), f"error {module.rel_error:.4f}"]
    facts += ["untrained"] if module.untrained else []
    facts += [f"error of outputs {module.output_error:.4f}"] if module.output_error is not None else []
    facts += [f"1 of {step} values drawn"] if step > 1 else []
    caption = f"{html.escape(module.name)}<br>{html.escape(' · '.join(facts))}"
    return f"<figure>{_svg(f's{number}', (_WIDTH, _HEIGHT), texts, parts)}<figcaption>{caption}</figcaption></figure>"


def _svg(key: str, size: tuple[int, int], texts: tuple[str, str], parts: Iterable[str]) -> str:
    """An SVG element with a title and a description, which have ids made from `key`."""
    title, description = map(html.escape, texts)
    return (
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-labelledby="{key}t {key}d">'
        f'<title id="{key}t">{title}</title><desc id="{key}d">{description}</desc>{"".join(parts)}</svg>'
    )


def _grid_line(width: int, y: float, label: str) -> str:
    """A horizontal line through a plot, and its label."""
    return (
        f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:g}" y2="{y:g}"/>'
        f'<text x="{_LEFT - 5}" y="{y + 3:g}">{label}</text>'
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = (f'<tr><th scope="row">{html.escape(key)}</th><td>{html.escape(value)}</td></tr>' for key, value in rows)
    return "<table>\n{}\n</table>".format("\n".join(cells))


def _change(module: ModuleReport) -> str:
    return f"rank {module.old_rank} → {module.new_rank}" + ("" if module.new_rank else ", dropped")


def _span(numbers: Iterable[int]) -> str:
    """The smallest and the largest, once if they are equal."""
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
