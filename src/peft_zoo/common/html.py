"""Self-contained HTML reports: one page with tables and SVG plots, without scripts, fonts, links or other resources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

LEFT, RIGHT, TOP, BOTTOM = 48, 8, 8, 8  # margins around a plot in SVG units

_ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)

_PAGE = _ENVIRONMENT.from_string("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --main: #1d4ed8; --faint: #93c5fd; --second: #6b7280; --grid: #8884; }
@media (prefers-color-scheme: dark) { :root { --main: #7dabff; --faint: #3b5b92; --second: #9ca3af; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1, td, figcaption { overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; margin: 0 0 1.5rem; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { font-weight: 500; width: 30%; }
td, figcaption { font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption { font-size: 13px; line-height: 1.35; }
svg { width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; text-anchor: end; }
line { stroke: var(--grid); }
polyline { fill: none; stroke: var(--main); stroke-width: 2; }
.main { fill: var(--main); }
.faint { fill: var(--faint); }
.second { fill: none; stroke: var(--second); }
.cut { stroke: currentColor; stroke-dasharray: 3 3; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ lead }}</p>
{% for section in sections %}
<h2>{{ section.heading }}</h2>
{% if section.rows %}
<table>
{% for key, value in section.rows %}
<tr><th scope="row">{{ key }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% endif %}
{{ section.plot }}
{% if section.note %}
<p>{{ section.note }}</p>
{% endif %}
{% if section.figures %}
<div class="figures">
{% for plot, caption in section.figures %}
<figure>{{ plot }}<figcaption>{{ caption|join("<br>"|safe) }}</figcaption></figure>
{% endfor %}
</div>
{% endif %}
{% endfor %}
</body>
</html>
""")

_SVG = _ENVIRONMENT.from_string("""\
<svg viewBox="0 0 {{ plot.width }} {{ plot.height }}" role="img" aria-label="{{ label }}">
{%- for y, text in grid -%}
<line x1="{{ left }}" x2="{{ plot.width - right }}" y1="{{ y }}" y2="{{ y }}"/>
{{- "" }}<text x="{{ left - 5 }}" y="{{ y + 3 }}">{{ text }}</text>
{%- endfor -%}
{{ shapes }}</svg>""")


@dataclass(frozen=True)
class Section:
    """Part of a page under a heading; empty fields are left out. Figures are small plots with lines of captions."""

    heading: str
    rows: Sequence[tuple[str, str]] = ()
    plot: Markup = Markup()
    note: str = ""
    figures: Sequence[tuple[Markup, Sequence[str]]] = ()


@dataclass(frozen=True)
class Plot:
    """Area of an SVG plot, in SVG units, with a linear vertical axis from `low` to `high`."""

    width: int
    height: int
    low: float
    high: float

    def x(self, share: float) -> float:
        """Horizontal position at a share of the width, from 0 to 1, in SVG units."""
        return round(LEFT + share * (self.width - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Vertical position of a value in SVG units; values outside the axis are moved to its ends."""
        share = (self.high - min(max(value, self.low), self.high)) / (self.high - self.low)
        return round(TOP + share * (self.height - TOP - BOTTOM), 1)

    def svg(self, label: str, grid: Iterable[tuple[float, str]], shapes: str) -> Markup:
        """SVG element with a label for screen readers, labelled horizontal grid lines, and trusted SVG `shapes`."""
        lines = [(self.y(value), text) for value, text in grid]
        shown = _SVG.render(plot=self, label=label, grid=lines, left=LEFT, right=RIGHT, shapes=Markup(shapes))
        return Markup(shown)


def render_page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Renders a page with a title, a first paragraph and sections; all texts are escaped."""
    return _PAGE.render(title=title, lead=lead, sections=sections)
