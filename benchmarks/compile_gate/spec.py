"""`CompileSpec`: one configuration of a kernel for the compile gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
"""Types of pointers by dtype."""


@dataclass(frozen=True)
class CompileSpec:
    """One configuration of a kernel that is launched, described for the compile gate.

    Attributes:
        name: Name in the table of the gate, `kernel[variant]`.
        kernel: The `triton.jit` function.
        signature: Types of the run-time arguments, such as `*bf16` or `i32`, by argument.
        constants: Values of the compile-time arguments, by argument.
        num_warps: Warps of a program.
        num_stages: Depth of software pipelines; 3 is Triton's default for launches.
        has_dot: Whether the kernel must use tensor cores.
        unit_strides: Strides that are 1 for contiguous memory.
        loads_matrix: Whether the kernel reads a matrix and so must load 16 bytes a thread at a time.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    has_dot: bool = False
    unit_strides: tuple[str, ...] = ()
    loads_matrix: bool = True
