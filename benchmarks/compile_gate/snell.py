"""Configurations of the kernels over SNELL's kernel matrix, and of the thresholds that share them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.compile_gate.spec import POINTERS, CompileSpec
from peft_zoo.kernels.base.kernel_spec import KERNELS
from peft_zoo.kernels.base.tiles_triton import _KINDS, DISTANCE, GIVEN, _log_sum_exp, constants
from peft_zoo.kernels.snell.factor_grad_triton import _constants, _factor_grad, _row_constants, _row_products
from peft_zoo.kernels.snell.weight_triton import _merge
from peft_zoo.kernels.sparse.threshold import WARM_BITS
from peft_zoo.kernels.sparse.threshold_triton import _COUNT_WARPS, _DIGITS, _count, _count_near, _narrow


def compile_specs() -> Iterator[CompileSpec]:
    """Yields all configurations."""
    for family in (_softmax_specs, _threshold_specs, _merge_specs, _gradient_specs):
        yield from family()


def _factor_signature(*pointers: str) -> dict[str, str]:
    """Types of the float32 pointers named and of the arguments that describe the factors, by argument."""
    floats = dict.fromkeys((*pointers, "x_ptr", "y_ptr", "params_ptr", "lse_ptr"), "*fp32")
    return floats | dict.fromkeys(("scale", "offset"), "fp32") | dict.fromkeys(("n_rows", "n_columns"), "i32")


def _variants(rank: int = 8) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and compile-time arguments of every kernel at two groups of rank `rank` each."""
    for name in KERNELS:
        yield name, constants(_KINDS[name], 2, name == "mix_k", 2, rank)
    yield "piecewise_linear, norm 1", constants(DISTANCE.value, 1, False, 2, rank)


def _softmax_specs() -> Iterator[CompileSpec]:
    signature = dict.fromkeys(("partial_ptr", "x_ptr", "y_ptr", "params_ptr"), "*fp32")
    signature |= dict.fromkeys(("n_rows", "n_columns", "tiles_per_split"), "i32")
    for rank in (4, 8, 64):
        yield CompileSpec(
            f"log_sum_exp[r={2 * rank}]", _log_sum_exp, signature, constants(DISTANCE.value, 2, True, 2, rank)
        )


def _threshold_specs() -> Iterator[CompileSpec]:
    signature = _factor_signature("w_ptr") | dict.fromkeys(("stride_r", "stride_c"), "i32") | {"table_ptr": "*i64"}
    count, near = signature | {"state_ptr": "*i64"}, signature | {"last_ptr": "*fp32"}
    unit, first = ("stride_c",), {"SHIFT": _DIGITS[0][0], "BINS": 1 << _DIGITS[0][1]}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = {"w_ptr": POINTERS[dtype]}
        name = f"given {POINTERS[dtype][1:]}"
        yield CompileSpec(
            f"count[{name}]", _count, count | given, constants(GIVEN.value) | first, _COUNT_WARPS, unit_strides=unit
        )
        warm = constants(GIVEN.value) | {"BITS": WARM_BITS}
        yield CompileSpec(f"count_near[{name}]", _count_near, near | given, warm, unit_strides=unit)
    for name, chosen in (*_variants(), ("piecewise_linear, r=128", constants(1, rank=64))):
        yield CompileSpec(f"count[{name}]", _count, count, chosen | first, _COUNT_WARPS, loads_matrix=False)
        yield CompileSpec(f"count_near[{name}]", _count_near, near, chosen | {"BITS": WARM_BITS})
    tables = {"table_ptr": "*i64", "state_ptr": "*i64", "threshold_ptr": "*fp32"}
    yield CompileSpec("narrow", _narrow, tables, first)


def _merge_specs() -> Iterator[CompileSpec]:
    """Yields every kernel in the default mode and every mode of the default kernel."""
    plain = constants(1)
    cases = [(name, torch.bfloat16, chosen, 1, True) for name, chosen in _variants()]
    cases += [("sparsify none", torch.bfloat16, plain, 0, True), ("product", torch.bfloat16, plain, 2, True)]
    cases += [("hard", torch.bfloat16, plain, 3, True), ("soft", torch.bfloat16, plain, 4, True)]
    cases += [("alone", torch.bfloat16, plain, 1, False), ("float16", torch.float16, plain, 1, True)]
    cases += [("float32", torch.float32, plain, 1, True), ("r=8", torch.bfloat16, constants(1, rank=4), 1, True)]
    cases += [("r=128", torch.bfloat16, constants(1, rank=64), 1, True)]
    for name, dtype, shared, mode, has_base in cases:
        pointers = dict.fromkeys(("merged_ptr", "base_ptr"), POINTERS[dtype]) | {"threshold_ptr": "*fp32"}
        signature = _factor_signature("w_ptr") | pointers | dict.fromkeys(("stride_r", "stride_c"), "i32")
        chosen = {**shared, "MODE": mode, "HAS_BASE": has_base}
        yield CompileSpec(f"kernelized_merge[{name}]", _merge, signature, chosen, unit_strides=("stride_c",))


def _gradient_specs() -> Iterator[CompileSpec]:
    """Yields both orientations of dM, which may have 16 bits, and every kernel."""
    integers = dict.fromkeys(("stride_r", "stride_c", "tiles_per_split"), "i32")
    cases = [(name, torch.bfloat16, chosen, 1) for name, chosen in _variants()]
    cases += [("float32", torch.float32, constants(1), 1), ("float16", torch.float16, constants(1), 1)]
    cases += [("r=8", torch.bfloat16, constants(1, rank=4), 1), ("r=128", torch.bfloat16, constants(1, rank=64), 1)]
    cases += [("mix_k, r=64", dtype, constants(1, 2, True, 2, 32), 1) for dtype in (torch.bfloat16, torch.float32)]
    cases += [("soft", torch.bfloat16, constants(1), 4), ("none", torch.bfloat16, constants(1), 0)]
    for name, dtype, shared, mode in cases:
        name = name if dtype == torch.bfloat16 or name.startswith("float") else f"{name}, {POINTERS[dtype][1:]}"
        signature = _factor_signature("dm_ptr") | {"dm_ptr": POINTERS[dtype]}
        pointers = ("own_ptr", "other_ptr", "rho_ptr", "threshold_ptr", "partial_ptr", "sums_ptr")
        for inputs, unit in ((True, "stride_r"), (False, "stride_c")):
            yield CompileSpec(
                f"factor_grad[{name}, {'A' if inputs else 'B'}]",
                _factor_grad,
                signature | dict.fromkeys(pointers, "*fp32") | integers,
                _constants(shared, mode, inputs),
                has_dot=shared["NORM"] == 2,
                unit_strides=(unit,),
            )
        if shared["MIX"]:
            yield CompileSpec(
                f"row_products[{name}]",
                _row_products,
                signature | dict.fromkeys(("threshold_ptr", "partial_ptr"), "*fp32") | integers,
                _row_constants(shared, mode),
                unit_strides=("stride_r",),
            )
