"""Reports of a training run: a text summary for the terminal, and an HTML page with the loss curve."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from peft_zoo.common.html import Plot, Section, render_page
from peft_zoo.tasks.base.outcome import STAGES, Outcome

Rows = list[tuple[str, str]]


def summary_text(outcome: Outcome) -> str:
    """Summary of at most 24 lines for a terminal; the scores come last."""
    facts = _fact_rows(outcome)
    scores = _score_rows(outcome)
    width = max(len(key) for key, _ in facts + scores) + 2
    lines = [f"  {key:<{width}}{value}" for key, value in facts]
    lines += ["", *(f"  {key:<{width}}{value}" for key, value in scores)]
    if outcome.note:
        lines += ["", f"  {outcome.note}"]
    return "\n".join(lines)


def report_html(outcome: Outcome) -> str:
    """Self-contained HTML page about a run; all texts are escaped."""
    settings = [(key.replace("_", " "), _plain(value)) for key, value in outcome.settings.items() if value is not None]
    curve = loss_curve(outcome.losses)
    note = "A dot for each step; the line is a running mean." if curve else "No finite loss was recorded."
    return render_page(
        f"{outcome.method} on {outcome.model}",
        f"{_verdict(outcome)} {outcome.note}".strip(),
        [
            Section("Result", rows=_score_rows(outcome)),
            Section("Training loss", plot=curve, note=note),
            Section("The run", rows=_fact_rows(outcome)),
            Section("Settings", rows=settings),
        ],
    )


def loss_curve(losses: Sequence[tuple[int, float]]) -> Markup:
    """Plots the finite losses by step as SVG: a dot for each step and the running mean as a line; empty without any."""
    points = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    if not points:
        return Markup()
    ticks = _ticks(min(loss for _, loss in points), max(loss for _, loss in points))
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    plot = Plot(720, 300, ticks[0], ticks[-1])

    def place(step: float, loss: float) -> tuple[float, float]:
        return plot.x((step - first) / (last - first)), plot.y(loss)

    dots = "".join('<circle class="faint" cx="{}" cy="{}" r="2.5"/>'.format(*place(*point)) for point in points)
    path = " ".join("{},{}".format(*place(*point)) for point in _smoothed(points))
    label = f"Training loss from {points[0][1]:.3f} at step {first} to {points[-1][1]:.3f} at step {points[-1][0]}"
    return plot.svg(label, [(tick, f"{tick:g}") for tick in ticks], f'{dots}<polyline points="{path}"/>')


def format_count(number: float, units: Sequence[str] = ("", " k", " M", " G"), base: int = 1000) -> str:
    """Formats a count with three significant digits and a unit, such as `1.23 M`."""
    for unit in units[:-1]:
        if abs(number) < base:
            return f"{number:.3g}{unit}" if unit else f"{number:g}"
        number /= base
    return f"{number:.3g}{units[-1]}"


def _verdict(outcome: Outcome) -> str:
    """Sentence about the metric before and after training."""
    before, after = outcome.scores["before"].value, outcome.scores["after"].value
    change = "improved" if outcome.improved else "did not improve"
    return f"{outcome.metric.capitalize()} {change}: {before:.4g} before, {after:.4g} after."


def _score_rows(outcome: Outcome) -> Rows:
    """Scores by stage, with the results of the checks after reload and merge."""
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
    """Facts about the run: method, data, sizes and times."""
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
            f"{steps} steps in {outcome.seconds['train']:.0f} s ({outcome.seconds['train'] / steps:.2f} s per step)",
        ),
        ("whole run", f"{outcome.seconds['all']:.0f} s"),
    ]
    if outcome.peak_memory_bytes:
        rows.append(("peak memory", f"{outcome.peak_memory_bytes / 2**30:.1f} GiB"))
    return rows


def _plain(value: object) -> str:
    """Setting as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or "defaults of the method"
    return str(value)


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven equally spaced round values from at most `low` to at least `high`."""
    span = max(high - low, 1e-6 * max(abs(high), 1.0))
    magnitude = 10.0 ** math.floor(math.log10(span))
    step = next(size * magnitude for size in (0.2, 0.5, 1.0, 2.0) if span / (size * magnitude) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Mean over a window of a fifth of the run around each point."""
    reach = max(len(points) // 10, 1)
    window = [[loss for _, loss in points[max(i - reach, 0) : i + reach + 1]] for i in range(len(points))]
    return [(step, sum(values) / len(values)) for (step, _), values in zip(points, window, strict=True)]
