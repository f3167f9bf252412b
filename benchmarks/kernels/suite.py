"""Measures every operator on an NVIDIA GPU: time, bandwidth, and speed against torch, torch.compile, cuBLAS and peft.

    python -m benchmarks.kernels               measure, print, write benchmarks/results/kernels_<device>.json
    python -m benchmarks.kernels --no-compile  without torch.compile, which takes minutes for some definitions
    python -m benchmarks.kernels --quick       the same at small sizes; writes nothing
    python -m benchmarks.kernels --estimate    only the least time that an H100 needs; the default without a GPU
    python -m benchmarks.kernels --markdown    only put the saved results into docs/kernels.md

An operator is only timed after its result has been compared with its definition in float64, in this run and at this
size. If that fails, it gets no time and no comparison, nothing is saved and the exit status is 1. During the run the
results so far are in kernels_<device>.partial.json. A run that is interrupted or finds a wrong result leaves that file;
only a complete run without wrong results replaces kernels_<device>.json.

Times ("us") are medians of `triton.testing.do_bench`, which empties the L2 cache before every call. That hides the
launches unless they take longer than the emptying, as they often do for an operator called from Python; then the time
is that of the launches. "us, graph" is the time inside a CUDA graph (`triton.testing.do_bench_cudagraph`), which
launches everything at once, so it is the device's work alone. The L2 cache is not emptied there, so data that fit into
it may be read faster than memory. A step that waits for the device cannot be captured and has no such time. Comparisons
are of "us". "% of copy" is relative to copying 1 GiB in the same run, and counts only the bytes that the operator
cannot avoid.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.kernels.case import FULL, H100, QUICK, Arguments, Case, Step
from benchmarks.kernels.cases import cases
from peft_zoo.kernels.base.operator import Operator, all_operators, why_not_triton

TRITON, TORCH = "Triton", "torch path"
OURS = {TRITON: "triton", TORCH: "torch"}
"""Our two paths, and the value of `PEFT_ZOO_KERNELS` that selects each."""

COPY_BYTES = 2**30
PAGE = common.ROOT / "docs" / "kernels.md"
Row = dict[str, Any]
Timer = Callable[[Step], Sequence[float]]
"""Returns the median, the 20 % and the 80 % quantile of a step's seconds."""


class Clock(NamedTuple):
    """Timers of a step.

    Attributes:
        calls: Times one call after the other.
        graph: Times replays of a CUDA graph; returns None for a step that cannot be captured.
    """

    calls: Timer
    graph: Callable[[Step], float | None]


def do_bench(step: Step) -> Sequence[float]:
    """Returns median, 20 % and 80 % quantile of a step's seconds on the GPU."""
    from triton.testing import do_bench as bench

    return [milliseconds / 1e3 for milliseconds in bench(step, quantiles=[0.5, 0.2, 0.8])]


def in_graph(step: Step) -> float | None:
    """Returns seconds of a step in a CUDA graph of about 10 ms, mean of ten replays; None if it cannot be captured.

    A failed capture would make torch's random generators unusable, so steps that wait for the device are detected
    before.
    """
    from triton.testing import do_bench_cudagraph as bench

    try:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return bench(step, rep=10) / 1e3
    except RuntimeError:
        return None


def copy_rate(device: torch.device, timer: Timer) -> float:
    """Returns bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / timer(lambda: target.copy_(source))[0]


@contextlib.contextmanager
def kernels(mode: str) -> Iterator[None]:
    """Sets `PEFT_ZOO_KERNELS` inside a `with` block."""
    before = os.environ.get("PEFT_ZOO_KERNELS")
    os.environ["PEFT_ZOO_KERNELS"] = mode
    try:
        yield
    finally:
        if before is None:
            del os.environ["PEFT_ZOO_KERNELS"]
        else:
            os.environ["PEFT_ZOO_KERNELS"] = before


# ---- correctness ----


def widened(value: Any) -> Any:
    """Converts an argument of an operator to float64, with `requires_grad` as before."""
    if isinstance(value, list):
        return [widened(v) for v in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return torch.float64 if isinstance(value, torch.dtype) else value


def private(operator: Operator, arguments: Arguments) -> Arguments:
    """Copies the arguments that the operator changes in place."""
    names = [argument.name for argument in operator.op._opoverload._schema.arguments]
    if not operator.mutates:
        return arguments
    return tuple(v.clone() if n in operator.mutates else v for n, v in zip(names, arguments, strict=True))


def outcome(case: Case, operator: Operator, arguments: Arguments) -> list[Tensor]:
    """Returns the results of a case, or the tensors that it changes in place, as copies."""
    own = private(operator, arguments)
    result = (case.run or operator)(*own)
    return (
        _tensors(result) if not operator.mutates else [v for v, old in zip(own, arguments, strict=True) if v is not old]
    )


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


def what_is_wrong(case: Case, got: Sequence[Tensor], want: Sequence[Tensor]) -> str | None:
    """Compares results with those of the definition in float64; returns the largest error as text, or None."""
    if [t.shape for t in got] != [t.shape for t in want]:
        return f"shapes {[tuple(t.shape) for t in got]}, should be {[tuple(t.shape) for t in want]}"
    for number, (g, w) in enumerate(zip(got, want, strict=True)):
        g, w = g.detach().double(), w.detach().double()
        difference, size = (g - w).abs(), w.norm() / max(1, w.numel()) ** 0.5
        if case.by_norm:
            error = difference.norm() / w.norm()
            wrong = not bool(error <= case.tolerance)  # so that NaN is wrong
        else:
            error = difference / (w.abs() + size)
            wrong = int((~((difference == 0) | (error <= case.tolerance))).sum()) > case.outliers
        if wrong:
            return f"result {number}: relative error {float(error.max()):.1e}, {case.tolerance:.1e} allowed"
    return None


def reference_of(case: Case, operator: Operator) -> Callable[..., Any]:
    """Returns the definition of the results of a case."""
    return case.reference or operator.reference


# ---- measuring ----


def measure(case: Case, device: torch.device, clock: Clock, compiled: bool = True) -> list[Row]:
    """Returns the rows of a case: our two paths and, unless one is wrong, definition, compiled definition, peers."""
    operator = all_operators()[case.operators[0]]
    arguments = case.make(device)
    want = _tensors(reference_of(case, operator)(*widened(list(arguments))))
    rows = []
    for name, mode in OURS.items():
        with kernels(mode):
            refused = _why_left_to_torch(case, operator, arguments) if name == TRITON else None
            rows.append({"method": name, "skipped": refused} if refused else _own(case, name, want, arguments, clock))
    if any("wrong" in row for row in rows):
        return [row if "wrong" in row else {"method": row["method"], "skipped": "see above"} for row in rows]
    for name, build in _others(case, operator, compiled).items():
        try:
            rows.append(_timed(name, build(*arguments), clock))
        except Exception as error:  # noqa: BLE001, a peer's failure of any kind does not end the run
            rows.append({"method": name, "skipped": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"})
    return rows


def _why_left_to_torch(case: Case, operator: Operator, arguments: Arguments) -> str | None:
    if case.run is None and operator.triton_module is not None:
        return operator.why_not_triton(*arguments)
    return why_not_triton(next(a for a in arguments if isinstance(a, Tensor)))


def _own(case: Case, name: str, want: list[Tensor], arguments: Arguments, clock: Clock) -> Row:
    operator = all_operators()[case.operators[0]]
    wrong = what_is_wrong(case, outcome(case, operator, arguments), want)
    if wrong:
        return {"method": name, "wrong": wrong}
    run, own = case.run or operator, private(operator, arguments)
    return _timed(name, lambda: run(*own), clock)


def _timed(name: str, step: Step, clock: Clock) -> Row:
    median, low, high = clock.calls(step)
    return {
        "method": name,
        "seconds": median,
        "seconds_20": low,
        "seconds_80": high,
        "graph_seconds": clock.graph(step),
    }


def _others(case: Case, operator: Operator, compiled: bool) -> dict[str, Callable[..., Step]]:
    reference = reference_of(case, operator)

    def eager(*arguments: Any) -> Step:
        return lambda: reference(*arguments)

    def compile_it(*arguments: Any) -> Step:
        torch._dynamo.reset()
        function = torch.compile(reference, dynamic=False)
        return lambda: function(*arguments)

    return {"torch eager": eager, **({"torch.compile": compile_it} if compiled else {}), **case.peers}


def facts(device: torch.device) -> Row:
    """Returns the facts of `common.machine` and the versions of Triton, CUDA and the driver."""
    own: Row = {"triton": None, "cuda": torch.version.cuda, "driver": None}
    with contextlib.suppress(PackageNotFoundError):
        own["triton"] = version("triton")
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        own["driver"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    return common.machine(device) | own


# ---- output ----

HEADER = ("", "us", "20 %", "80 %", "us, graph", "GB/s", "% of copy", "x longer than ours")
SUMMARY = ("us", "ours", "ours, graph", "torch path", "fastest other", "floor")


def table(case: Case, rows: Sequence[Row], rate: float) -> str:
    """Formats the rows of a case, with ratios to Triton's time, or the torch path's without Triton.

    Args:
        case: The case.
        rows: Result of `measure`.
        rate: Bytes per second of a large copy.
    """
    base = next((row["seconds"] for row in rows if row["method"] in OURS and "seconds" in row), None)
    return common.aligned((case.name, *HEADER[1:]), (_cells(case, row, base, rate) for row in rows))


def _cells(case: Case, row: Mapping[str, Any], base: float | None, rate: float) -> tuple[str, ...]:
    if "seconds" not in row:
        return f"{row['method']}: {row.get('wrong') or row['skipped']}", *["-"] * (len(HEADER) - 1)
    times = [_microseconds(row[key]) for key in ("seconds", "seconds_20", "seconds_80", "graph_seconds")]
    moved = case.bytes / row["seconds"]
    return (
        *(row["method"], *times, f"{moved / 1e9:.0f}", f"{100 * moved / rate:.0f}"),
        f"{row['seconds'] / base:.2f}" if base else "-",
    )


def _microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def markdown(results: Sequence[Row]) -> str:
    """Formats saved results as Markdown, with a row for each case: Triton, the torch path, and the fastest other."""
    floors, parts = {case.name: case.floor(H100)[0] for case in cases()}, []
    for result in results:
        machine, rows = result["machine"], []
        for case in result["cases"]:
            timed = {row["method"]: row for row in case["rows"] if "seconds" in row}
            ours, torch_path = timed.get(TRITON, {}), timed.get(TORCH, {})
            others = [(row["seconds"], name) for name, row in timed.items() if name not in OURS]
            fastest = f"{_microseconds(min(others)[0])} ({min(others)[1]})" if others else "-"
            own = (ours.get("seconds"), ours.get("graph_seconds"), torch_path.get("seconds"))
            rows.append((case["name"], *map(_microseconds, own), fastest, _microseconds(floors[case["name"]])))
        about = f"{common.describe(machine)}, Triton {machine['triton']}, driver {machine['driver']}."
        parts += [f"{about} {result.get('note', '')}".strip(), common.markdown(SUMMARY, rows)]
    return "\n\n".join(parts) or "Not measured yet: `python -m benchmarks.kernels`."


def saved() -> list[Row]:
    """Reads the complete results in benchmarks/results."""
    paths = [path for path in sorted(common.RESULTS.glob("kernels_*.json")) if ".partial" not in path.suffixes]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def write_page() -> None:
    """Writes the saved results into docs/kernels.md."""
    page = common.replace_block(PAGE.read_text(encoding="utf-8"), "results", markdown(saved()))
    PAGE.write_text(page, encoding="utf-8")


def estimate(chosen: Sequence[Case]) -> str:
    """Formats the least time of every case on an H100, from its data sheet."""
    rows = []
    for case in chosen:
        seconds, bound = case.floor(H100)
        flops, slots = (sum(getattr(work, key) for work in case.work) / 1e9 for key in ("flops", "slots"))
        rows.append(
            (case.name, f"{case.bytes / 1e6:.1f}", f"{flops:.1f}", f"{slots:.2f}", f"{seconds * 1e6:.1f}", bound)
        )
    rates = f"{H100.bytes / 1e9:.0f} GB/s, {H100.flops / 1e12:.0f} TFLOP/s, {H100.slots / 1e12:.1f} T instructions/s"
    header = ("", "MB", "GFLOP", "G instr.", "us", "bound by")
    return f"{common.aligned(header, rows)}\n\nAn H100 by its data sheet ({rates}). Nothing here was measured."


def run(chosen: Sequence[Case], clock: Clock, compiled: bool, path: Path | None) -> int:
    """Measures and prints cases, saves a partial result after each, and the whole result if no row is wrong.

    Args:
        chosen: Cases to measure.
        clock: Timers of their steps.
        compiled: Whether to measure `torch.compile` of the definitions too.
        path: File to save; None to save nothing.

    Returns:
        Exit status: 1 if a row is wrong, else 0.
    """
    device = torch.device("cuda")
    result: Row = {
        "benchmark": "kernels",
        "machine": facts(device),
        "copy_bytes_per_second": copy_rate(device, clock.calls),
        "cases": [],
    }
    print(common.describe(result["machine"]) + f", driver {result['machine']['driver']}")
    print(f"A copy of 1 GiB: {result['copy_bytes_per_second'] / 1e9:.0f} GB/s", flush=True)
    for case in chosen:
        rows = measure(case, device, clock, compiled)
        result["cases"].append({"name": case.name, "bytes": case.bytes, "rows": rows})
        print(f"\n{table(case, rows, result['copy_bytes_per_second'])}", flush=True)
        if path:
            common.write_json(partial_path(path), result)
    wrong = [case["name"] for case in result["cases"] if any("wrong" in row for row in case["rows"])]
    print(f"\nWrong: {', '.join(wrong)}" if wrong else "")
    if path and not wrong:
        common.write_json(path, result)
        partial_path(path).unlink(missing_ok=True)
    return bool(wrong)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.markdown:
        write_page()
        return 0
    chosen = [case for case in cases(QUICK if options.quick else FULL) if options.only in case.name]
    if options.estimate or not torch.cuda.is_available():
        print(estimate(chosen))
        return 0
    path = options.json
    if path is None and not (options.quick or options.only):
        path = common.result_path("kernels", torch.cuda.get_device_name())
    return run(chosen, Clock(do_bench, in_graph), not options.no_compile, path)


def partial_path(path: Path) -> Path:
    """Returns the path of the results during a run."""
    return path.with_suffix(".partial.json")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument("--estimate", action="store_true", help="only print the least times on an H100")
    parser.add_argument("--markdown", action="store_true", help="only write saved results into docs/kernels.md")
    parser.add_argument("--no-compile", action="store_true", help="do not measure torch.compile")
    parser.add_argument("--quick", action="store_true", help="small sizes; writes no file unless --json is given")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this in their name; writes no file")
    parser.add_argument("--json", type=Path, help="result file (default benchmarks/results/kernels_<device>.json)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
