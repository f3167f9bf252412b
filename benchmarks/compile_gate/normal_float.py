"""Configurations of the NormalFloat kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.compile_gate.spec import POINTERS, CompileSpec
from peft_zoo.kernels.normal_float.linear import KERNEL_TOKENS
from peft_zoo.kernels.normal_float.linear_triton import (
    CHUNK,
    LINEAR_WARPS,
    MERGE_WARPS,
    ROWS,
    WIDEST,
    WIDTH,
    _merge,
    _product,
    _tile,
)
from peft_zoo.kernels.normal_float.quantize_triton import NUM_WARPS, VALUES, _dequantize


def compile_specs() -> Iterator[CompileSpec]:
    """Yields all configurations."""
    yield from _dequantize_specs()
    yield from _product_specs()


def _dequantize_specs() -> Iterator[CompileSpec]:
    """Yields all widths of codes and scales, in blocks of usual sizes."""
    pointers = {"codes_ptr": "*i32", "scales_ptr": "*i32", "offset_ptr": "*fp32", "levels_ptr": "*fp32"}
    for bits, scale_bits, block in ((2, 2, 16), (3, 3, 32), (4, 4, 64), (8, 8, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            yield CompileSpec(
                f"nf_dequantize[{bits} bits, scales of {scale_bits}, {str(dtype).removeprefix('torch.')}]",
                _dequantize,
                {**pointers, "group_scales_ptr": "*bf16", "out_ptr": POINTERS[dtype], "count": "i32"},
                {"BITS": bits, "SCALE_BITS": scale_bits, "BLOCK": block, "GROUP": 256, "VALUES": VALUES},
                num_warps=NUM_WARPS,
                loads_matrix=False,
            )


def _product_specs() -> Iterator[CompileSpec]:
    """Yields all widths of codes, one and two tokens, both factor dtypes."""
    packed = {"codes_ptr": "*i32", "scales_ptr": "*i32", "group_scales_ptr": "*bf16"}
    packed |= {"offset_ptr": "*fp32", "levels_ptr": "*fp32"}
    sizes = dict.fromkeys(("rows", "columns", "rank"), "i32")
    for bits, scale_bits, block in ((2, 2, 16), (3, 3, 32), (4, 4, 64), (8, 8, 64)):
        quantization = {"BITS": bits, "SCALE_BITS": scale_bits, "BLOCK": block, "GROUP": 256}
        for dtype, tokens in ((torch.bfloat16, 1), (torch.bfloat16, KERNEL_TOKENS), (torch.float32, 1)):
            dense = dict.fromkeys(("x_ptr", "low_ptr", "B_ptr", "bias_ptr", "out_ptr"), POINTERS[dtype])
            yield CompileSpec(
                f"nf_linear[{bits} bits, {POINTERS[dtype][1:]}, {tokens} tokens]",
                _product,
                packed | dense | sizes | {"tokens": "i32"},
                quantization | {"HAS_BIAS": True} | _tile(tokens, WIDEST),
                num_warps=LINEAR_WARPS,
                loads_matrix=False,
            )
        for factors in (torch.bfloat16, torch.float32):
            dense = dict.fromkeys(("A_ptr", "B_ptr"), POINTERS[factors]) | {"out_ptr": "*bf16", "scaling": "fp32"}
            yield CompileSpec(
                f"nf_merge[{bits} bits, {POINTERS[factors][1:]} factors]",
                _merge,
                packed | dense | sizes,
                quantization | {"ROWS": ROWS, "WIDTH": WIDTH, "CHUNK": CHUNK},
                num_warps=MERGE_WARPS,
                has_dot=True,
            )
