"""Configurations of the LoRA kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.compile_gate.spec import POINTERS, CompileSpec
from peft_zoo.kernels.lora.merge_triton import NUM_WARPS, _constants, _merge


def compile_specs() -> Iterator[CompileSpec]:
    """Yields all configurations."""
    strides = ("out_stride_m", "out_stride_n", "weight_stride_m", "weight_stride_n")
    integers = dict.fromkeys(("rows", "columns", "chunks", *strides), "i32") | {"seed": "i64"}
    for weight, factors, chunk, stochastic in (
        (torch.bfloat16, torch.bfloat16, 16, False),
        (torch.bfloat16, torch.bfloat16, 16, True),
        (torch.bfloat16, torch.bfloat16, 64, False),
        (torch.bfloat16, torch.float32, 16, False),
        (torch.float16, torch.float16, 32, False),
        (torch.float16, torch.float32, 16, True),
        (torch.float32, torch.float32, 16, False),
    ):
        pointers = dict.fromkeys(("out_ptr", "weight_ptr"), POINTERS[weight])
        pointers |= dict.fromkeys(("left_ptr", "right_ptr"), POINTERS[factors]) | {"scale_ptr": "*fp32"}
        name = f"{POINTERS[weight][1:]}, {POINTERS[factors][1:]} factors, chunk {chunk}{', stochastic' * stochastic}"
        yield CompileSpec(
            f"merge_lora[{name}]",
            _merge,
            pointers | integers,
            _constants(chunk, stochastic),
            num_warps=NUM_WARPS,
            has_dot=True,
            unit_strides=("out_stride_n", "weight_stride_n"),
        )
