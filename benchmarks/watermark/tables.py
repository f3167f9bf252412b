"""Markdown tables of the benchmark results, averaged over keys."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks import common

PAGE = common.ROOT / "docs" / "methods" / "watermark_lora.md"
NAMES = {"two_sided": "LoRA", "dlws": "LoRA, dlws", "augmented": "LoRA, augmented", "full": "full decoder"}

Run = Mapping[str, Any]
UNTIMED = {"seconds": None, "seconds_to_99": None}
"""Replaces the times of runs on another machine than that of the table."""
Cells = dict[tuple[str, int], list[Run]]
"""Maps method and number of bits to runs, one per key."""


def all_tables(result: Mapping[str, Any]) -> str:
    """Returns all tables in Markdown.

    Args:
        result: Saved result of the benchmark.
    """
    cells: Cells = {}
    for name, run in result["runs"].items():
        method, bits, _ = name.split("/")
        cells.setdefault((method, int(bits)), []).append(run)
    ours = {bits: runs for (method, bits), runs in sorted(cells.items()) if method == "two_sided"}
    attacked = [_attacks(cells, kind, f"to the {kind}") for kind in ("images", "weights")]
    parts = [_quality(cells), cost_table(cells), alarm_table(ours), *attacked]
    return "\n\n".join(parts)


def write_docs(path: Path, *others: Path) -> None:
    """Writes the machine, the settings and the tables of saved results to the page of the method.

    Args:
        path: Path of a result.
        others: Paths of results from other machines, with more keys; their times are omitted.

    Raises:
        ValueError: If the settings differ.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    given = {name: value for name, value in result["settings"].items() if value is not None and name != "quick"}
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items())
    parts = [f"{common.describe(result['machine'])}; {said}."]
    for other in (json.loads(path.read_text(encoding="utf-8")) for path in others):
        parts.append(_joined(result, other))
    content = f"{' '.join(parts)}\n\n{all_tables(result)}"
    page = common.replace_block(PAGE.read_text(encoding="utf-8"), "measured", content)
    PAGE.write_text(page, encoding="utf-8")


def _joined(result: dict[str, Any], other: Mapping[str, Any]) -> str:
    """Adds the runs of another machine to a result; returns a sentence that names them."""
    if unlike := differing(result["settings"], other["settings"]) - {"device"}:
        raise ValueError(f"--docs: results differ in {', '.join(sorted(unlike))}; give results with the same settings.")
    more = {name: {**run, **UNTIMED} for name, run in other["runs"].items() if name not in result["runs"]}
    result["runs"] |= more
    return f"Trained separately, without times: {', '.join(more)} ({common.describe(other['machine'])})."


def differing(settings: Mapping[str, Any], others: Mapping[str, Any]) -> set[str]:
    """Returns the names of settings that differ; a missing one counts as None, the default of the method."""
    return {name for name in {*settings, *others} if settings.get(name) != others.get(name)}


def _quality(cells: Cells) -> str:
    tests = list(next(iter(cells.values()))[0]["found"])
    header = ["mark", "PSNR, dB", "SSIM", "bits correct", *(f"found: {_test_title(test)}" for test in tests)]
    rows = []
    for (method, bits), runs in _ordered(cells):
        figures = [_deviating(runs, "psnr", "{:.1f}"), _mean((run["ssim"] for run in runs), "{:.3f}")]
        figures.append(_deviating(runs, "bit_accuracy", "{:.2%}"))
        figures += [_mean((run["found"][test] for run in runs), "{:.1%}") for test in tests]
        rows.append([f"{bits} bits, {NAMES[method]}", *figures])
    return common.markdown(header, rows)


def _test_title(name: str) -> str:
    images, rate = name.split(", ")
    return f"{images} image{'s' if images != '1' else ''} at {rate}"


def cost_table(cells: Cells) -> str:
    """Returns the table of trained parameters and times."""
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
        seconds = _mean((run["seconds"] for run in runs), "{:.1f}")
        rows.append([f"{bits} bits, {NAMES[method]}", parameters, seconds, to_99])
    return common.markdown(["mark", "parameters", "training, s", "s to 99 % of a batch's bits"], rows)


def alarm_name(test: str, rate: float) -> str:
    """Returns the name of a false-alarm rate in results; without its rate for 1e-3, the only rate of old results."""
    return test if rate == 1e-3 else f"{test}, {rate:g}"


def alarm_table(ours: Mapping[int, list[Run]]) -> str:
    """Returns the table of false-alarm rates by number of bits and images per test."""
    found = {bits: [run["false_alarms"] for run in runs] for bits, runs in ours.items()}
    every = [one for shares in found.values() for one in shares]
    wheres = union(every)
    images = union(one[where] for one in every for where in wheres)
    tests = union(one[where][count] for one in every for where in wheres for count in one[where])
    columns = [(where, test) for where in wheres for test in tests]
    rows = [
        [f"{count} ({bits} bits)"]
        + [_mean((one[where].get(count, {}).get(test) for one in shares), "{:.1e}") for where, test in columns]
        for bits, shares in found.items()
        for count in images
    ]
    return common.markdown(["images per test", *map(", ".join, columns)], rows)


def union(names: Iterable[Iterable[str]]) -> list[str]:
    """Returns each name once, in order of first occurrence."""
    return list(dict.fromkeys(chain.from_iterable(names)))


def _attacks(cells: Cells, kind: str, title: str) -> str:
    """Returns the table of attacks: bit accuracy, share of detected groups in brackets, and PSNR if measured.

    Attacks on images have a further column of clean images after the same attack, for a key with the most bits.
    """
    attacked = {key: [run["attacks"] for run in runs] for key, runs in _ordered(cells) if "attacks" in runs[0]}
    columns = [
        (f"{bits} bits, {NAMES[method]}", [one[kind] for one in runs]) for (method, bits), runs in attacked.items()
    ]
    if kind == "images":
        most = max(bits for _, bits in attacked)
        known = [one["controls"] for one in attacked["two_sided", most] if "controls" in one]
        columns += [(f"clean images, {most} bits", known)] if known else []
    names = union(one for _, runs in columns for one in runs)
    rows = [[name, *(_attack_cell([one.get(name) for one in runs]) for _, runs in columns)] for name in names]
    return common.markdown([title, *(header for header, _ in columns)], rows)


def _attack_cell(found: Sequence[Run | None]) -> str:
    """Formats the values of one attack, averaged over keys; a dash if a result lacks it."""
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return "-"
    text = f"{statistics.fmean(one['bit_accuracy'] for one in known):.1%}"
    if known[0]["found"] is not None:
        text += f" ({statistics.fmean(one['found'] for one in known):.0%})"
    if "psnr" in known[0]:
        text += f", {statistics.fmean(one['psnr'] for one in known):.1f} dB"
    return text


def _ordered(cells: Cells) -> list[tuple[tuple[str, int], list[Run]]]:
    return sorted(cells.items(), key=lambda cell: (list(NAMES).index(cell[0][0]), cell[0][1]))


def _mean(values: Iterable[float | None], form: str) -> str:
    """Formats the mean; a dash if a value is missing."""
    found = list(values)
    known = [value for value in found if value is not None]
    return form.format(statistics.fmean(known)) if len(known) == len(found) else "-"


def _deviating(runs: list[Run], name: str, form: str) -> str:
    """Formats mean and standard deviation over keys."""
    values = [run[name] for run in runs]
    text = form.format(statistics.fmean(values))
    return text if len(values) == 1 else f"{text} ± {form.format(statistics.stdev(values))}"
