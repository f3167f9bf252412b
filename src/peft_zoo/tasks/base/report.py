"""A run on one screen and on one page: the text summary, and `report.html` with its loss curve drawn as inline SVG.

The page is one file without scripts, fonts or links, so it opens without a network and can be mailed.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from peft_zoo.tasks.base.outcome import STAGES, Outcome

Rows = list[tuple[str, str]]

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 36  # margins around the plot, in SVG units

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #2563eb; --dots: #93c5fd; --grid: #8884; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 760px; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; margin: 0 0 1.5rem; }}
th, td {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--grid); vertical-align: top; }}
th {{ font-weight: 500; width: 40%; }}
td {{ font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }}
svg {{ width: 100%; height: auto; }}
svg text {{ font: 12px system-ui, sans-serif; fill: currentColor; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{lead}</p>
<h2>Result</h2>
{scores}
<h2>Training loss</h2>
{curve}
<p>A dot for each step; the line is the mean of the steps around it.</p>
<h2>The run</h2>
{facts}
<h2>Settings</h2>
{settings}
</body>
</html>
"""


def summary_text(outcome: Outcome) -> str:
    """The run as text for a terminal: facts first, the scores last, at most 24 lines."""
    facts = _fact_rows(outcome)
    scores = _score_rows(outcome)
    width = max(len(key) for key, _ in facts + scores) + 2
    lines = [f"  {key:<{width}}{value}" for key, value in facts]
    lines += ["", *(f"  {key:<{width}}{value}" for key, value in scores)]
    if outcome.note:
        lines += ["", f"  {outcome.note}"]
    return "\n".join(lines)


def report_html(outcome: Outcome) -> str:
    """The run as one self-contained page; every text from outside is escaped."""
    title = f"{outcome.method} on {outcome.model}"
    settings = [(key.replace("_", " "), _plain(value)) for key, value in outcome.settings.items() if value is not None]
    return _PAGE.format(
        title=html.escape(title),
        lead=html.escape(f"{_verdict(outcome)} {outcome.note}".strip()),
        scores=_table(_score_rows(outcome)),
        curve=loss_curve(outcome.losses),
        facts=_table(_fact_rows(outcome)),
        settings=_table(settings),
    )


def loss_curve(losses: Sequence[tuple[int, float]]) -> str:
    """The training loss as an SVG element: a dot for each step, a line through the running mean.

    Args:
        losses: Pairs of optimizer step and loss; losses that are not finite are left out.
    """
    points = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    if not points:
        return "<p>No finite loss was recorded.</p>"
    ticks = _ticks(min(loss for _, loss in points), max(loss for _, loss in points))
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    low, high = ticks[0], ticks[-1]

    def place(step: float, loss: float) -> tuple[float, float]:
        x = _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (high - loss) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    dots = [place(step, loss) for step, loss in points]
    path = " ".join("{},{}".format(*place(step, loss)) for step, loss in _smoothed(points))
    parts = [_grid_line(place(first, tick)[1], tick) for tick in ticks]
    parts += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="var(--dots)"/>' for x, y in dots]
    parts.append(f'<polyline points="{path}" fill="none" stroke="var(--line)" stroke-width="2"/>')
    base = _HEIGHT - 12
    parts.append(f'<text x="{_LEFT}" y="{base}">step {first}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{base}" text-anchor="end">step {points[-1][0]}</text>')
    label = f"Training loss from {points[0][1]:.3f} to {points[-1][1]:.3f}"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def format_count(number: float, units: Sequence[str] = ("", " k", " M", " G"), base: int = 1000) -> str:
    """A count with three significant digits, as in `1.23 M`."""
    for unit in units[:-1]:
        if abs(number) < base:
            return f"{number:.3g}{unit}" if unit else f"{number:g}"
        number /= base
    return f"{number:.3g}{units[-1]}"


def _verdict(outcome: Outcome) -> str:
    before, after = outcome.scores["before"].value, outcome.scores["after"].value
    way = "improved" if outcome.improved else "did not improve"
    return f"{outcome.metric.capitalize()} {way}: {before:.4g} before, {after:.4g} after."


def _score_rows(outcome: Outcome) -> Rows:
    marks = {
        "reloaded": "equal" if outcome.reload_matches else "DIFFERS",
        "merged": "equal to rounding" if outcome.merge_matches else "DIFFERS",
    }
    rows = []
    for stage, score in outcome.scores.items():
        mark = f"  ({marks[stage]})" if stage in marks else ""
        rows.append((f"{outcome.metric} {STAGES[stage]}", f"{score.value:.4f}{mark}"))
    return rows


def _fact_rows(outcome: Outcome) -> Rows:
    share = 100 * outcome.trainable_parameters / max(outcome.total_parameters, 1)
    steps = max(len(outcome.losses), 1)
    rows = [
        ("task", outcome.task),
        ("method", " ".join([outcome.method, *(f"{k}={v}" for k, v in outcome.settings["options"].items())])),
        ("model", outcome.model),
        ("data", outcome.data),
        ("trainable parameters", f"{format_count(outcome.trainable_parameters)} ({share:.2f} %)"),
        ("adapter file", f"{format_count(outcome.adapter_bytes, ('B', ' KiB', ' MiB', ' GiB'), 1024)}"),
        (
            "training",
            f"{steps} steps in {outcome.seconds['train']:.0f} s ({outcome.seconds['train'] / steps:.2f} s a step)",
        ),
        ("whole run", f"{outcome.seconds['all']:.0f} s"),
    ]
    if outcome.peak_memory_bytes:
        rows.append(("peak memory", f"{outcome.peak_memory_bytes / 2**30:.1f} GiB"))
    return rows


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or "as the method suggests"
    return str(value)


def _table(rows: Rows) -> str:
    cells = "\n".join(f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in rows)
    return f"<table>\n{cells}\n</table>"


def _grid_line(y: float, tick: float) -> str:
    return (
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="var(--grid)"/>'
        f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers that enclose `low` and `high`."""
    span = max(high - low, 1e-6 * max(abs(high), 1.0))
    magnitude = 10.0 ** math.floor(math.log10(span))
    step = next(size * magnitude for size in (0.2, 0.5, 1.0, 2.0) if span / (size * magnitude) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean over a window of a fifth of the run around each point."""
    reach = max(len(points) // 10, 1)
    window = [[loss for _, loss in points[max(i - reach, 0) : i + reach + 1]] for i in range(len(points))]
    return [(step, sum(values) / len(values)) for (step, _), values in zip(points, window, strict=True)]
