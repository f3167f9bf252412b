"""First part of `benchmarks.lq_lora.suite`: bit budgets of a large model, solved by `plan_bits` and by HiGHS."""

from __future__ import annotations

import functools
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.squeeze import files as squeeze_files
from peft_zoo.kernels.normal_float.quantize import NFConfig, NFTensor, dequantize_operator, packed_bits, quantize
from peft_zoo.kernels.planning.bits import GRIDS, BitChoice, MatrixErrors, plan_bits

Row = dict[str, Any]
CONFIGS = GRIDS["full432"]
BUDGETS = (2.5, 2.75, 3.0, 4.0)
SECONDS_GOAL, GAP_GOAL = 0.3, 0.02


@dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmark; by default LLaMA-2-7B and one of its square matrices.

    Attributes:
        layers: Layers of the model whose bits are planned, with seven matrices each.
        sample: Number of values that each quantization config is measured on.
        size: Rows and columns of the matrix that is decomposed.
        rank: Rank of its low-rank part.
    """

    layers: int = 32
    sample: int = 2**15
    size: int = 4096
    rank: int = 64


QUICK = Sizes(layers=2, sample=2**11, size=256, rank=16)


def definition(tensor: NFTensor, config: NFConfig, shape: Sequence[int]) -> Tensor:
    """Dequantizes a matrix by the reference implementation, not by the code that is timed."""
    return dequantize_operator.reference(*tensor, *config.integers, math.prod(shape), torch.float32).view(shape)


def shapes(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Returns the shapes of the matrices of LLaMA-2-7B, or of some of its layers, by name."""
    return squeeze_files.Sizes(layers=sizes.layers).shapes()


def synthetic_tables(sizes: Sizes, configs: Sequence[NFConfig]) -> dict[str, MatrixErrors]:
    """Returns error tables like those of LLaMA-2-7B: each matrix is between a normal and a heavy-tailed one, scaled.

    Errors are measured on a sample of either distribution; those of a real model would take hours.
    """
    normal, heavy = (_shares(values, configs) for values in _samples(sizes.sample))
    random, tables = np.random.default_rng(0), {}
    for name, shape in shapes(sizes).items():
        count, tails = math.prod(shape), random.uniform()
        scale = count / 4096 * random.lognormal()  # of matrices with entries of about 1/64, more or less
        errors = scale * ((1 - tails) * normal + tails * heavy) * random.lognormal(sigma=0.02, size=len(configs))
        bits = [packed_bits(config, count) for config in configs]
        tables[name] = tuple(map(BitChoice, configs, [0] * len(configs), bits, errors.tolist()))
    return tables


def _samples(count: int) -> tuple[Tensor, Tensor]:
    """Returns values of a normal distribution, and of Student's with four degrees of freedom."""
    generator = torch.Generator().manual_seed(0)
    normal, *others = torch.randn(6, count, generator=generator)
    return normal, others[0] / torch.stack(others[1:]).square().mean(0).sqrt()


def _shares(values: Tensor, configs: Sequence[NFConfig]) -> Any:
    """Returns the relative squared error of every quantization config."""
    restored = (definition(quantize(values, config), config, values.shape) for config in configs)
    return np.array([((values - r).norm() / values.norm()).item() ** 2 for r in restored])


def measure_plans(sizes: Sizes, repeats: int, highs_seconds: float) -> list[Row]:
    """Measures a row for each budget: `plan_bits`, and HiGHS unless its time is 0 or scipy is missing."""
    tables = synthetic_tables(sizes, CONFIGS)
    num_weights = sum(math.prod(shape) for shape in shapes(sizes).values())
    rows = []
    for budget in BUDGETS:
        choices, found = plan_bits(tables, budget, num_weights)
        error, bound = sum(choice.error for choice in choices.values()), -found.bound
        row: Row = {"method": f"plan_bits, {budget:g} bits", "matrices": len(tables), "budget": budget}
        if wrong := wrong_plan(tables, choices, error, budget * num_weights, (-found.value, bound)):
            rows.append(row | {"wrong": wrong})
            continue
        step = functools.partial(plan_bits, tables, budget, num_weights)
        seconds = common.interleaved({"": step}, repeats, torch.device("cpu"))[""]
        row |= {"seconds": statistics.median(seconds), "seconds_best": min(seconds), "seconds_all": seconds}
        row |= {"gap_percent": 100 * (error / bound - 1), "bits": _bits(choices) / num_weights}
        if highs_seconds and importlib.util.find_spec("scipy"):
            row["highs"] = highs(tables, budget, num_weights, bound, highs_seconds)
        rows.append(row)
        print(*cells(row), sep="  ", file=sys.stderr, flush=True)
    return rows


def _bits(choices: Mapping[str, BitChoice]) -> int:
    return sum(choice.bits for choice in choices.values())


def wrong_plan(
    tables: Mapping[str, MatrixErrors],
    choices: Mapping[str, BitChoice],
    error: float,
    budget: float,
    said: tuple[float, float],
) -> str | None:
    """Returns what is wrong with a plan, or None; `said` is the allocator's error and lower bound."""
    if choices.keys() != tables.keys() or any(choice not in tables[name] for name, choice in choices.items()):
        return "it lacks a valid choice for every matrix"
    if _bits(choices) > budget:
        return f"it costs {_bits(choices)} bits, {budget:.0f} are allowed"
    if not math.isclose(error, said[0], rel_tol=1e-9):
        return f"its error is {error:.6g}, it says {said[0]:.6g}"
    if not 0 < said[1] <= error * (1 + 1e-9):
        return f"its error {error:.6g} is below the bound {said[1]:.6g}"
    return None


def highs(
    tables: Mapping[str, MatrixErrors], budget: float, num_weights: int, bound: float, seconds: float
) -> dict[str, Any]:
    """Measures scipy's HiGHS with a time limit in seconds; it has a binary variable for every choice."""
    import scipy.optimize
    import scipy.sparse

    errors, bits = (
        np.array([[getattr(c, key) for c in table] for table in tables.values()]) for key in ("error", "bits")
    )
    once = scipy.sparse.kron(scipy.sparse.eye_array(len(errors)), np.ones((1, errors.shape[1])), format="csr")
    spent = scipy.sparse.csr_array(bits.reshape(1, -1) / num_weights)  # near 1: the solver is content within 1e-6
    start = time.perf_counter()
    solution = scipy.optimize.milp(
        errors.ravel() * (1e3 / bound),
        integrality=np.ones(errors.size),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[scipy.optimize.LinearConstraint(once, 1, 1), scipy.optimize.LinearConstraint(spent, 0, budget)],
        options={"time_limit": seconds, "mip_rel_gap": 1e-4},
    )
    row: Row = {"seconds": time.perf_counter() - start, "finished": solution.status == 0, "gap_percent": None}
    if solution.x is not None:
        chosen = np.arange(len(errors)), solution.x.reshape(errors.shape).argmax(1)
        row |= {"gap_percent": 100 * (errors[chosen].sum() / bound - 1), "bits": bits[chosen].sum() / num_weights}
    return row


# ---- showing ----

HEADER = (
    *("", "runs", f"s (goal {SECONDS_GOAL:g})", "best s", f"gap % (goal {GAP_GOAL:g})", "bits used"),
    *("HiGHS s", "its gap %", "its bits"),
)


def cells(row: Row) -> tuple[str, ...]:
    """A row as text; one that is wrong has no num_weights."""
    if "wrong" in row:
        return row["method"], "wrong", *["-"] * (len(HEADER) - 2)
    own = f"{row['seconds']:.3f}", f"{row['seconds_best']:.3f}", f"{row['gap_percent']:.4f}", f"{row['bits']:.5f}"
    return row["method"], str(len(row["seconds_all"])), *own, *_highs_cells(row.get("highs"))


def _highs_cells(found: Row | None) -> tuple[str, ...]:
    if found is None:
        return "-", "-", "-"
    seconds = f"{found['seconds']:.1f}" + ("" if found["finished"] else ", unfinished")
    if found["gap_percent"] is None:
        return seconds, "-", "-"
    return seconds, f"{found['gap_percent']:.4f}", f"{found['bits']:.5f}"
