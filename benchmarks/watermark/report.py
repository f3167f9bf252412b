"""The tables of `benchmarks.watermark.suite`: means over the keys."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks import common

PAGE = common.ROOT / "docs" / "methods" / "watermark_lora.md"
NAMES = {"two_sided": "LoRA", "dlws": "LoRA, dlws", "augmented": "LoRA, augmented", "full": "all of the decoder"}

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
    parts = [_quality(cells), costs(cells), alarms(ours), _images(cells), _weights(cells)]
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
    if unlike := differing(result["settings"], other["settings"]) - {"device"}:
        raise ValueError(f"--docs: results differ in {', '.join(sorted(unlike))}; give those of the same settings.")
    more = {name: {**run, **UNTIMED} for name, run in other["runs"].items() if name not in result["runs"]}
    result["runs"] |= more
    return f"Trained apart, and without its times: {', '.join(more)} ({common.describe(other['machine'])})."


def differing(settings: Mapping[str, Any], others: Mapping[str, Any]) -> set[str]:
    """Names of settings that differ; one that a result is too old to know is None, the method's default."""
    return {name for name in {*settings, *others} if settings.get(name) != others.get(name)}


def _quality(cells: Cells) -> str:
    tests = list(next(iter(cells.values()))[0]["found"])
    header = ["mark", "PSNR, dB", "SSIM", "bits right", *(f"found: {_test(test)}" for test in tests)]
    rows = []
    for (method, bits), runs in _ordered(cells):
        figures = [_deviating(runs, "psnr", "{:.1f}"), _mean((run["ssim"] for run in runs), "{:.3f}")]
        figures.append(_deviating(runs, "bit_accuracy", "{:.2%}"))
        figures += [_mean((run["found"][test] for run in runs), "{:.1%}") for test in tests]
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
        seconds = _mean((run["seconds"] for run in runs), "{:.1f}")
        rows.append([f"{bits} bits, {NAMES[method]}", parameters, seconds, to_99])
    return common.markdown(["mark", "trained", "s of training", "s to 99 % of a batch's bits"], rows)


def alarm(test: str, rate: float) -> str:
    """What a share of false alarms is called: without its rate where results had this one only, at first."""
    return test if rate == 1e-3 else f"{test}, {rate:g}"


def alarms(ours: Mapping[int, list[Run]]) -> str:
    """Shares of random messages that are found, for every number of bits and of images in one test."""
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
    return common.markdown(["images of one test", *map(", ".join, columns)], rows)


def union(names: Iterable[Iterable[str]]) -> list[str]:
    """Each name once, in the order in which they come."""
    return list(dict.fromkeys(chain.from_iterable(names)))


def _images(cells: Cells) -> str:
    return _attacks(cells, "images", "to the images")


def _weights(cells: Cells) -> str:
    return _attacks(cells, "weights", "to the weights")


def _attacks(cells: Cells, kind: str, title: str) -> str:
    """For each attack the share of right bits, and in brackets of groups of images that are found; PSNR if it has.

    Images also have a column of controls: clean ones after the same attack, read with a key of the most bits.
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
    rows = [[name, *(_left([one.get(name) for one in runs]) for _, runs in columns)] for name in names]
    return common.markdown([title, *(header for header, _ in columns)], rows)


def _left(found: Sequence[Run | None]) -> str:
    """What one attack has left of the marks of all keys; a dash if a result does not know it."""
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
    """A dash if one is missing."""
    found = list(values)
    known = [value for value in found if value is not None]
    return form.format(statistics.fmean(known)) if len(known) == len(found) else "-"


def _deviating(runs: list[Run], name: str, form: str) -> str:
    """Mean, and the standard deviation over the keys."""
    values = [run[name] for run in runs]
    text = form.format(statistics.fmean(values))
    return text if len(values) == 1 else f"{text} ± {form.format(statistics.stdev(values))}"
