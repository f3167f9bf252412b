"""Measures LQ-LoRA's bit budgets, its decomposition, compared with LoftQ and bitsandbytes, and an error table.

    python -m benchmarks.lq_lora               measure, print, write benchmarks/results/lq_lora_<device>.json
    python -m benchmarks.lq_lora --quick       the same at toy sizes, in seconds; writes nothing

On a GPU also dequantization and products with a packed weight, as `benchmarks.kernels.suite` measures them.

Every result is checked before it is timed: a plan must keep its budget and have the error that it states, and the error
of a decomposition is computed again in float64 from the definition of its parts. If one is wrong, its row has no
measurement, nothing is saved and the exit status is 1. Rows with one run include its warm-up.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.kernels import case as kernel_case
from benchmarks.kernels import normal_float
from benchmarks.kernels import suite as kernels
from benchmarks.kernels.case import H100, Case, Work, random_tensor
from benchmarks.lq_lora import loftq
from benchmarks.lq_lora import plans as lq_lora_plans
from benchmarks.lq_lora.plans import QUICK, Row, Sizes, definition
from peft_zoo.kernels.low_rank.quantized import DecomposeOptions, quantized_low_rank
from peft_zoo.kernels.normal_float.quantize import NFConfig, packed_bits
from peft_zoo.kernels.planning.bits import GRIDS, MatrixErrors, matrix_errors

SLOW = 5.0
"""Seconds from which a method is run once only."""
NF4 = NFConfig(4, 8, "fp32", 64, 256)
GRID = "default60"
TOKENS = (32,)
"""Numbers of tokens of the product, in addition to the single token of `benchmarks.kernels.suite`."""


# ---- one matrix ----


def spectral_matrix(size: int, device: torch.device) -> Tensor:
    """Returns a matrix with singular values i^-0.6, like a language model's, random directions and outlier columns."""
    generator = torch.Generator(device).manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=generator, device=device)).Q for _ in range(2))
    W = U * torch.arange(1, size + 1, device=device) ** -0.6 @ V.mT
    W[:, :: size // 8] *= 5
    return W


@dataclass(frozen=True)
class Parts:
    """Parts of a method's decomposition W ~ Q + B A.

    Attributes:
        Q: Dequantized matrix.
        factors: B and A; None if the method has none.
        bits: Bits per weight of Q as stored.
        error: Relative error that the method states; None if it states none.
        iterations: Number of iterations.
    """

    Q: Tensor
    factors: tuple[Tensor, Tensor] | None
    bits: float
    error: float | None = None
    iterations: int = 1

    def measured(self, W: Tensor) -> float:
        """Returns the relative error, computed in float64."""
        rest = W.double() - self.Q.double()
        if self.factors is not None:
            rest -= self.factors[0].double() @ self.factors[1].double()
        return (rest.norm() / W.double().norm()).item()


@dataclass(frozen=True)
class Method:
    """A quantization method.

    Attributes:
        run: Timed function of the matrix and the rank.
        read: Function of the matrix and the result that returns its parts; not timed.
    """

    run: Callable[[Tensor, int], Any]
    read: Callable[[Tensor, Any], Parts]


def _ours(iterations: int, **options: Any) -> Callable[[Tensor, int], Any]:
    chosen = DecomposeOptions(iterations=iterations, **options)
    return lambda W, rank: quantized_low_rank(W, rank, NF4, chosen)


def _read_ours(W: Tensor, found: Any) -> Parts:
    stored = found.Q[:3]  # without tables that all matrices of a size share, as below
    bits = 8 * sum(tensor.nbytes for tensor in stored) / W.numel()
    return Parts(definition(found.Q, NF4, W.shape), (found.B, found.A), bits, found.error, found.iterations)


def _loftq(W: Tensor, rank: int) -> Any:
    from peft.utils.loftq_utils import loftq_init

    with loftq.loftq_anywhere():
        return loftq_init(W, num_bits=4, reduced_rank=rank, num_iter=1)


def _read_loftq(W: Tensor, found: Any) -> Parts:
    Q, A, B = found
    return Parts(Q, (B, A), loftq.BITS)


def _bitsandbytes(W: Tensor, rank: int) -> Any:
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(W, quant_type="nf4", compress_statistics=True)


def _read_bitsandbytes(W: Tensor, found: Any) -> Parts:
    from bitsandbytes.functional import dequantize_4bit

    codes, state = found
    stored = codes, state.absmax, state.state2.absmax
    return Parts(dequantize_4bit(codes, state), None, 8 * sum(tensor.nbytes for tensor in stored) / W.numel())


PLAIN = "quantize, no low rank"
METHODS = {
    PLAIN: Method(lambda W, rank: _ours(1)(W, 0), _read_ours),
    "quantized_low_rank, 1 iteration": Method(_ours(1), _read_ours),
    "quantized_low_rank, 10 iterations": Method(_ours(10), _read_ours),
    "quantized_low_rank, 10, new SVDs": Method(_ours(10, svd="randomized"), _read_ours),
}
PEERS = {
    "NF4 (bitsandbytes), no low rank": Method(_bitsandbytes, _read_bitsandbytes),
    "LoftQ (peft), 1 iteration": Method(_loftq, _read_loftq),
}


def methods() -> dict[str, Method]:
    """Returns our methods, and those of bitsandbytes and peft if they are installed."""
    return {**METHODS, **(PEERS if importlib.util.find_spec("bitsandbytes") else {})}


def wrong_parts(parts: Parts, measured: float, plain: float | None) -> str | None:
    """Returns what is wrong with a decomposition, or None; `plain` is the error without a low-rank part."""
    if parts.error is not None and not math.isclose(parts.error, measured, rel_tol=1e-3):
        return f"it says its relative error is {parts.error:.4g}, but it is {measured:.4g}"
    most = 0.5 if plain is None else 1.05 * plain  # bitsandbytes rounds its scales by another rule
    return None if measured <= most else f"its relative error is {measured:.4g}, {most:.4g} at most is expected"


def measure_splits(W: Tensor, rank: int, repeats: int) -> list[Row]:
    """Measures a row for each method on one matrix; those that are not slow are repeated in turn."""
    rows: dict[str, Row] = {}
    steps: dict[str, common.Step] = {}
    for name, method in methods().items():
        step = functools.partial(method.run, W, rank)
        timed, found = _once(step, W.device)
        parts = method.read(W, found)
        error, plain = parts.measured(W), rows.get(PLAIN, {}).get("error")
        if wrong := wrong_parts(parts, error, plain):
            rows[name] = {"method": name, "wrong": wrong}
            continue
        rows[name] = {"method": name, "error": error, "bits": parts.bits, "iterations": parts.iterations}
        rows[name]["seconds_all"] = [timed]
        if timed < SLOW:
            steps[name] = step
        print(f"{name}: right, error {error:.4f}, {timed:.1f} s", file=sys.stderr, flush=True)
    for name, seconds in common.interleaved(steps, repeats, W.device, warmup=0).items():
        rows[name]["seconds_all"] = seconds
    for row in rows.values():
        if "wrong" not in row:
            row["seconds"] = statistics.median(row["seconds_all"])
    return list(rows.values())


def _once(step: common.Step, device: torch.device) -> tuple[float, Any]:
    """Returns the seconds of one run and its result."""
    found: list[Any] = []
    seconds = common.interleaved({"": lambda: found.append(step())}, 1, device, warmup=0)[""][0]
    return seconds, found[0]


def measure_table(W: Tensor, rank: int) -> Row:
    """Measures the error table of a matrix with all quantization configs."""
    configs = GRIDS[GRID]
    seconds, table = _once(lambda: matrix_errors(W, configs, [rank]), W.device)
    row: Row = {"method": f"matrix_errors, {GRID}", "ways": len(configs)}
    wrong = wrong_table(W, rank, configs, table)
    return row | ({"wrong": wrong} if wrong else {"seconds": seconds})


def wrong_table(W: Tensor, rank: int, configs: Sequence[NFConfig], table: MatrixErrors) -> str | None:
    """Returns what is wrong with an error table, or None; one entry is computed again in float64."""
    if [(c.config, c.bits) for c in table] != [(config, packed_bits(config, W.numel())) for config in configs]:
        return "its configs are not those of the grid"
    nf = configs[-1]._replace(bits=4)
    found = quantized_low_rank(W, rank, nf, DecomposeOptions(iterations=1))
    parts = Parts(definition(found.Q, nf, W.shape), (found.B, found.A), 0.0)
    said, measured = table[configs.index(nf)].error, parts.measured(W) * W.double().norm().item()
    right = math.isclose(math.sqrt(said), measured, rel_tol=1e-3)
    return None if right else f"the error of {tuple(nf)} is {measured:.4g}, its root says {math.sqrt(said):.4g}"


# ---- dequantization, on a GPU ----


def decode_cases(sizes: kernel_case.Sizes) -> list[Case]:
    """Returns the cases of dequantizing a weight, and of products with it for one token and for more."""
    restore, one = (case for case in normal_float.cases(sizes) if case.operators[0] != "nf_merge")
    return [restore, one, *(_with_tokens(one, tokens, sizes.width) for tokens in TOKENS)]


def _with_tokens(case: Case, tokens: int, width: int) -> Case:
    """Returns the case of one token's product with more tokens, whose inputs and outputs count."""

    def make(device: torch.device) -> kernel_case.Arguments:
        x, *parts, low, B, bias, a, b, c, d, e, f, transposed = case.make(device)
        draw = functools.partial(random_tensor, tokens, device=device, scale=width**-0.5, dtype=x.dtype)
        return draw(x.shape[-1]), *parts, draw(low.shape[-1]), B, bias, a, b, c, d, e, f, transposed

    (work,) = case.work
    more = Work(work.bytes + 2 * tokens * 2 * width, 2 * tokens * width**2, work.slots)
    return replace(case, name=case.name.replace("1 token", f"{tokens} tokens"), make=make, work=(more,))


def measure_decode(sizes: Sizes, device: torch.device) -> list[Row]:
    """Measures every case as `benchmarks.kernels.suite` does, with an H100's lower bound."""
    found, clock = [], kernels.Clock(kernels.do_bench, kernels.in_graph)
    for case in decode_cases(kernel_case.Sizes(width=sizes.size)):
        rows = kernels.measure(case, device, clock, compiled=False)
        least = {"least_seconds": case.floor(H100)[0]}
        found += [{**row, **least, "method": f"{case.name}: {row['method']}"} for row in rows]
    return found


# ---- showing ----

SPLIT_HEADER = ("", "runs", "s", "iterations", "relative error", "bits per weight")
DECODE_HEADER = ("", "us", "us, graph", "an H100 at the least")


def split_cells(row: Row) -> tuple[str, ...]:
    """Returns a row as text; a wrong row has no measurements."""
    if "wrong" in row:
        return row["method"], "wrong", *["-"] * (len(SPLIT_HEADER) - 2)
    numbers = str(row["iterations"]), f"{row['error']:.4f}", f"{row['bits']:.3f}"
    return row["method"], str(len(row["seconds_all"])), f"{row['seconds']:.2f}", *numbers


def decode_cells(row: Row) -> tuple[str, ...]:
    """Returns a row of the dequantization part as text."""
    if "seconds" not in row:
        return f"{row['method']}: {row.get('wrong') or row['skipped']}", *["-"] * (len(DECODE_HEADER) - 1)
    graph = "-" if row["graph_seconds"] is None else f"{row['graph_seconds'] * 1e6:.1f}"
    return row["method"], f"{row['seconds'] * 1e6:.1f}", graph, f"{row['least_seconds'] * 1e6:.1f}"


def shown(result: Mapping[str, Any]) -> str:
    """Returns the whole result as text."""
    size, rank, table = result["sizes"]["size"], result["sizes"]["rank"], result["table"]
    extra = 16 * rank * 2 / size
    seconds = "wrong" if "wrong" in table else f"{table['seconds']:.2f} s"
    lines = [
        f"Bits for {result['plans'][0]['matrices']} matrices, {result['ways']} configs each. The gap is the "
        "error's distance from the bound of the linear relaxation.",
        common.aligned(lq_lora_plans.HEADER, map(lq_lora_plans.cells, result["plans"])),
        "",
        f"One matrix {size} x {size}, rank {rank}, float32. B and A cost {extra:.3f} bits per weight more in 16 bits.",
        common.aligned(SPLIT_HEADER, map(split_cells, result["splits"])),
        "",
        f"{table['method']}, {table['ways']} configs for this matrix: {seconds}",
    ]
    if result["decode"]:
        lines += ["", "Dequantization:", common.aligned(DECODE_HEADER, map(decode_cells, result["decode"]))]
    return "\n".join(lines)


def measure(sizes: Sizes, options: argparse.Namespace, device: torch.device) -> Row:
    """Measures all parts and returns the result to save."""
    W = spectral_matrix(sizes.size, device)
    highs_seconds = (1.0 if options.quick else 30.0) if options.highs_seconds is None else options.highs_seconds
    return {
        "ways": len(lq_lora_plans.CONFIGS),
        "plans": lq_lora_plans.measure_plans(sizes, options.repeats, highs_seconds),
        "splits": measure_splits(W, sizes.rank, options.repeats),
        "table": measure_table(W, sizes.rank),
        "decode": [] if device.type == "cpu" else measure_decode(sizes, device),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = QUICK if options.quick else Sizes()
    sizes = replace(sizes, size=options.size or sizes.size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: Row = {"benchmark": "lq_lora", "machine": common.machine(device), "sizes": asdict(sizes)}
    print(common.describe(result["machine"]), flush=True)
    result |= measure(sizes, options, device)
    print("\n" + shown(result))
    rows = [*result["plans"], *result["splits"], result["table"], *result["decode"]]
    wrong = [f"{row['method']}: {row['wrong']}" for row in rows if "wrong" in row]
    path = options.output or (None if options.quick else common.result_path("lq_lora", result["machine"]["device"]))
    return common.finish(path, result, wrong)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.lq_lora.suite", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="toy sizes; writes no file unless --output is given")
    parser.add_argument("--size", type=int, help=f"rows and columns of the one matrix (default {Sizes.size})")
    parser.add_argument("--repeats", type=int, default=3, help="runs of methods that are not slow (default 3)")
    parser.add_argument("--threads", type=int, help="threads on the CPU (default: torch's choice)")
    parser.add_argument(
        "--highs-seconds", type=float, help="time limit of HiGHS; 0 leaves it out (default 30; quick 1)"
    )
    parser.add_argument(
        "--output", type=Path, help="file of the result (default benchmarks/results/lq_lora_<device>.json)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
