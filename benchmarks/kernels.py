"""Every operator on an NVIDIA GPU: time, bandwidth, and how much faster than torch, torch.compile, cuBLAS or peft.

    python -m benchmarks.kernels               measure, print, write benchmarks/results/kernels_<device>.json
    python -m benchmarks.kernels --quick       the same at small sizes; writes nothing
    python -m benchmarks.kernels --estimate    only the least time that an H100 needs; all there is without a GPU

An operator is only timed after its result has been compared with its definition in float64, in this run and at this
size. If that fails it has no number, nobody is compared with it, nothing is saved and the exit status is 1.

Times are medians of `triton.testing.do_bench`, which empties the L2 cache between calls, and so hides launches as long
as nothing waits for the device. "% of copy" compares with what copying 1 GiB reaches in the same run, and counts only
the bytes that the operator cannot avoid.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.kernel_cases import FULL, H100, QUICK, Arguments, Case, Step, cases
from peft_zoo.kernels.base import Operator, all_operators, why_not_triton

TRITON, TORCH = "Triton", "torch path"
OURS = {TRITON: "triton", TORCH: "torch"}
"""Our two ways, and the `PEFT_ZOO_KERNELS` that chooses them."""

COPY_BYTES = 2**30
Row = dict[str, Any]
Timer = Callable[[Step], Sequence[float]]
"""Of a step the median, the fifth part and four fifths of its seconds."""


def do_bench(step: Step) -> Sequence[float]:
    """Seconds of a step on the GPU: median, 20 % and 80 % quantile."""
    from triton.testing import do_bench as bench

    return [milliseconds / 1e3 for milliseconds in bench(step, quantiles=[0.5, 0.2, 0.8])]


def copy_rate(device: torch.device, timer: Timer) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / timer(lambda: target.copy_(source))[0]


@contextlib.contextmanager
def kernels(mode: str) -> Iterator[None]:
    """Sets `PEFT_ZOO_KERNELS` for a while."""
    before = os.environ.get("PEFT_ZOO_KERNELS")
    os.environ["PEFT_ZOO_KERNELS"] = mode
    try:
        yield
    finally:
        if before is None:
            del os.environ["PEFT_ZOO_KERNELS"]
        else:
            os.environ["PEFT_ZOO_KERNELS"] = before


# ---- is it right? ----


def widened(value: Any) -> Any:
    """An argument of an operator in float64, gradients still wanted where they were."""
    if isinstance(value, list):
        return [widened(v) for v in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return torch.float64 if isinstance(value, torch.dtype) else value


def private(operator: Operator, arguments: Arguments) -> Arguments:
    """The arguments with those copied that the operator changes."""
    names = [argument.name for argument in operator.op._opoverload._schema.arguments]
    if not operator.mutates:
        return arguments
    return tuple(v.clone() if n in operator.mutates else v for n, v in zip(names, arguments, strict=True))


def outcome(case: Case, operator: Operator, arguments: Arguments) -> list[Tensor]:
    """What the case computes: results, or what it changes; the arguments stay as they are."""
    own = private(operator, arguments)
    result = (case.run or operator)(*own)
    return (
        _tensors(result) if not operator.mutates else [v for v, old in zip(own, arguments, strict=True) if v is not old]
    )


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


def what_is_wrong(case: Case, got: Sequence[Tensor], want: Sequence[Tensor]) -> str | None:
    """Compare results with those of the definition in float64; says how far the worst is off, or None."""
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
    """The definition of what the case computes."""
    return case.reference or operator.reference


# ---- measuring ----


def measure(case: Case, device: torch.device, timer: Timer, compiled: bool = True) -> list[Row]:
    """The rows of a case: our two ways, and unless they are wrong the definition, compiled and not, and the peers."""
    operator = all_operators()[case.operators[0]]
    arguments = case.make(device)
    want = _tensors(reference_of(case, operator)(*widened(list(arguments))))
    rows = []
    for name, mode in OURS.items():
        with kernels(mode):
            refused = _why_left_to_torch(case, operator, arguments) if name == TRITON else None
            rows.append({"method": name, "skipped": refused} if refused else _own(case, name, want, arguments, timer))
    if any("wrong" in row for row in rows):
        return [row if "wrong" in row else {"method": row["method"], "skipped": "see above"} for row in rows]
    for name, build in _others(case, operator, compiled).items():
        try:
            rows.append(_timed(name, build(*arguments), timer))
        except Exception as error:  # noqa: BLE001, others may fail in any way, and we are measured all the same
            rows.append({"method": name, "skipped": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"})
    return rows


def _why_left_to_torch(case: Case, operator: Operator, arguments: Arguments) -> str | None:
    if case.run is None:
        return operator.why_not_triton(*arguments)
    return why_not_triton(next(a for a in arguments if isinstance(a, Tensor)))


def _own(case: Case, name: str, want: list[Tensor], arguments: Arguments, timer: Timer) -> Row:
    operator = all_operators()[case.operators[0]]
    wrong = what_is_wrong(case, outcome(case, operator, arguments), want)
    if wrong:
        return {"method": name, "wrong": wrong}
    run, own = case.run or operator, private(operator, arguments)
    return _timed(name, lambda: run(*own), timer)


def _timed(name: str, step: Step, timer: Timer) -> Row:
    median, low, high = timer(step)
    return {"method": name, "seconds": median, "seconds_20": low, "seconds_80": high}


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
    """Those of every benchmark, and what kernels depend on beside them."""
    own: Row = {"triton": None, "cuda": torch.version.cuda, "driver": None}
    with contextlib.suppress(PackageNotFoundError):
        own["triton"] = version("triton")
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        own["driver"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    return common.machine(device) | own


# ---- showing ----

HEADER = ("", "us", "20 %", "80 %", "GB/s", "% of copy", "x longer than ours")


def table(case: Case, rows: Sequence[Row], rate: float) -> str:
    """The rows of a case as text; `rate` is that of a large copy. Compared with Triton, or the torch path without."""
    base = next((row["seconds"] for row in rows if row["method"] in OURS and "seconds" in row), None)
    return common.aligned((case.name, *HEADER[1:]), (_cells(case, row, base, rate) for row in rows))


def _cells(case: Case, row: Mapping[str, Any], base: float | None, rate: float) -> tuple[str, ...]:
    if "seconds" not in row:
        return f"{row['method']}: {row.get('wrong') or row['skipped']}", *["-"] * (len(HEADER) - 1)
    times = [f"{row[key] * 1e6:.1f}" for key in ("seconds", "seconds_20", "seconds_80")]
    moved = case.bytes / row["seconds"]
    return (
        *(row["method"], *times, f"{moved / 1e9:.0f}", f"{100 * moved / rate:.0f}"),
        f"{row['seconds'] / base:.2f}" if base else "-",
    )


def estimate(chosen: Sequence[Case]) -> str:
    """The least time of every case on an H100, from its data sheet."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    sizes = QUICK if options.quick else FULL
    chosen = [case for case in cases(sizes) if options.only in case.name]
    if options.estimate or not torch.cuda.is_available():
        print(estimate(chosen))
        return 0
    device = torch.device("cuda")
    result: Row = {
        "benchmark": "kernels",
        "machine": facts(device),
        "copy_bytes_per_second": copy_rate(device, do_bench),
    }
    print(common.describe(result["machine"]) + f", driver {result['machine']['driver']}")
    print(f"A copy of 1 GiB: {result['copy_bytes_per_second'] / 1e9:.0f} GB/s", flush=True)
    result["cases"] = []
    for case in chosen:
        rows = measure(case, device, do_bench)
        result["cases"].append({"name": case.name, "bytes": case.bytes, "rows": rows})
        print(f"\n{table(case, rows, result['copy_bytes_per_second'])}", flush=True)
    wrong = [case["name"] for case in result["cases"] if any("wrong" in row for row in case["rows"])]
    print(f"\nWrong: {', '.join(wrong)}" if wrong else "")
    path = options.json or (None if options.quick or options.only else result_path(result["machine"]["device"]))
    if path and not wrong:
        common.write_json(path, result)
    return bool(wrong)


def result_path(name: str) -> Path:
    """Where the results of a GPU lie."""
    return common.RESULTS / f"kernels_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.json"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument("--estimate", action="store_true", help="only what an H100 needs at the least")
    parser.add_argument("--quick", action="store_true", help="small sizes; writes no file unless --json is given")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this in their name; writes no file")
    parser.add_argument("--json", type=Path, help="where to save (default benchmarks/results/kernels_<device>.json)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
