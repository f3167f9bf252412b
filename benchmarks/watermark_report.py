"""The tables of `benchmarks.watermark`: means over the keys."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import common

PAGE = common.ROOT / "docs" / "methods" / "watermark_lora.md"
NAMES = {"two_sided": "LoRA", "dlws": "LoRA, dlws", "full": "all of the decoder"}

Run = Mapping[str, Any]
UNTIMED = {"seconds": None, "seconds_to_99": None}
"""Of a run on another machine than that of the table."""
Cells = dict[tuple[str, int], list[Run]]
"""Runs of every method and number of bits, one for each key."""


def tables(result: Mapping[str, Any]) -> str:
    """All tables in Markdown.

    Args:
        result: What the benchmark saves.
    """
    cells: Cells = {}
    for name, run in result["runs"].items():
        method, bits, _ = name.split("/")
        cells.setdefault((method, int(bits)), []).append(run)
    ours = {bits: runs for (method, bits), runs in sorted(cells.items()) if method == "two_sided"}
    parts = [_quality(cells), costs(cells), _alarms(ours), _images(cells), _weights(cells)]
    return "\n\n".join(parts)


def write_docs(path: Path, *others: Path) -> None:
    """Put the tables of a saved result into the page of the method, after what it was measured on.

    Args:
        path: The result.
        others: Of other machines, with more keys; their times are not counted.

    Raises:
        ValueError: If one was trained with other settings.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    given = {name: value for name, value in result["settings"].items() if value is not None and name != "quick"}
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items())
    parts = [f"{common.describe(result['machine'])}; {said}."]
    for other in (json.loads(path.read_text(encoding="utf-8")) for path in others):
        parts.append(_joined(result, other))
    content = f"{' '.join(parts)}\n\n{tables(result)}"
    page = common.replace_block(PAGE.read_text(encoding="utf-8"), "measured", content)
    PAGE.write_text(page, encoding="utf-8")


def _joined(result: dict[str, Any], other: Mapping[str, Any]) -> str:
    """Add the runs of another machine to a result; returns a sentence that names them."""
    unlike = {
        name for name, value in result["settings"].items() if name != "device" and other["settings"][name] != value
    }
    if unlike:
        raise ValueError(f"--docs: results differ in {', '.join(sorted(unlike))}; give those of the same settings.")
    more = {name: {**run, **UNTIMED} for name, run in other["runs"].items() if name not in result["runs"]}
    result["runs"] |= more
    return f"Trained elsewhere, and without its times: {', '.join(more)} ({common.describe(other['machine'])})."


def _quality(cells: Cells) -> str:
    tests = list(next(iter(cells.values()))[0]["found"])
    header = ["mark", "PSNR, dB", "SSIM", "bits right", *(f"found: {_test(test)}" for test in tests)]
    rows = []
    for (method, bits), runs in _ordered(cells):
        figures = [_deviating(runs, "psnr", "{:.1f}"), _mean(runs, lambda run: run["ssim"], "{:.3f}")]
        figures.append(_deviating(runs, "bit_accuracy", "{:.2%}"))
        figures += [_mean(runs, lambda run, test=test: run["found"][test], "{:.1%}") for test in tests]  # type: ignore[misc]
        rows.append([f"{bits} bits, {NAMES[method]}", *figures])
    return common.markdown(header, rows)


def _test(name: str) -> str:
    images, rate = name.split(", ")
    return f"{images} image{'s' if images != '1' else ''} at {rate}"


def costs(cells: Cells) -> str:
    rows = []
    for (method, bits), runs in _ordered(cells):
        runs = [run for run in runs if run["seconds"] is not None]
        if not runs:
            continue
        times = [run["seconds_to_99"] for run in runs]
        reached = [time for time in times if time is not None]
        to_99 = f"{statistics.fmean(reached):.1f}" if reached else "-"
        if 0 < len(reached) < len(times):
            to_99 += f" ({len(reached)} of {len(times)})"
        parameters = f"{runs[0]['parameters']:,}"
        seconds = _mean(runs, lambda run: run["seconds"], "{:.1f}")
        rows.append([f"{bits} bits, {NAMES[method]}", parameters, seconds, to_99])
    return common.markdown(["mark", "trained", "s of training", "s to 99 % of a batch's bits"], rows)


def _alarms(ours: Mapping[int, list[Run]]) -> str:
    """False alarms at the most bits."""
    bits, runs = max(ours.items())
    header, rows = ["images of one test"], []
    wheres = list(runs[0]["false_alarms"])
    header += [f"{where}, {test}" for where in wheres for test in ("exact", "binomial")]
    for images in runs[0]["false_alarms"][wheres[0]]:
        figures = [
            f"{statistics.fmean(run['false_alarms'][where][images][test] for run in runs):.1e}"
            for where in wheres
            for test in ("exact", "binomial")
        ]
        rows.append([f"{images} ({bits} bits)", *figures])
    return common.markdown(header, rows)


def _images(cells: Cells) -> str:
    return _attacks(cells, "images", "to the images")


def _weights(cells: Cells) -> str:
    return _attacks(cells, "weights", "to the weights")


def _attacks(cells: Cells, kind: str, title: str) -> str:
    """For each attack the share of right bits, and in brackets of groups of images that are found; PSNR if it has."""
    attacked = [(key, runs) for key, runs in _ordered(cells) if "attacks" in runs[0]]
    header = [title, *(f"{bits} bits, {NAMES[method]}" for (method, bits), _ in attacked)]
    rows = []
    for name in attacked[0][1][0]["attacks"][kind]:
        row = [name]
        for _, runs in attacked:
            found = [run["attacks"][kind][name] for run in runs]
            text = f"{statistics.fmean(one['bit_accuracy'] for one in found):.1%}"
            if found[0]["found"] is not None:
                text += f" ({statistics.fmean(one['found'] for one in found):.0%})"
            if "psnr" in found[0]:
                text += f", {statistics.fmean(one['psnr'] for one in found):.1f} dB"
            row.append(text)
        rows.append(row)
    return common.markdown(header, rows)


def _ordered(cells: Cells) -> list[tuple[tuple[str, int], list[Run]]]:
    return sorted(cells.items(), key=lambda cell: (list(NAMES).index(cell[0][0]), cell[0][1]))


def _mean(runs: Iterable[Run], figure: Callable[[Run], float | None], form: str) -> str:
    values = [figure(run) for run in runs]
    known = [value for value in values if value is not None]
    return form.format(statistics.fmean(known)) if len(known) == len(values) else "-"


def _deviating(runs: list[Run], name: str, form: str) -> str:
    """Mean, and the standard deviation over the keys."""
    values = [run[name] for run in runs]
    text = form.format(statistics.fmean(values))
    return text if len(values) == 1 else f"{text} ± {form.format(statistics.stdev(values))}"
