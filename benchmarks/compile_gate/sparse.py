"""Configurations of the kernels for sparse masks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.compile_gate.spec import POINTERS, CompileSpec
from peft_zoo.kernels.sparse.mask_triton import BLOCK, BLOCK_ACROSS, NUM_WARPS, _rank, _select, _tile


def compile_specs() -> Iterator[CompileSpec]:
    """Yields all configurations."""
    yield from _mask_specs()
    yield from _rank_specs()


def _mask_specs() -> Iterator[CompileSpec]:
    strides = [f"{t}_stride_{d}" for t in ("out", "weight", "mask", "score") for d in "mn"]
    integers = dict.fromkeys(["rows", "columns", *strides], "i32")
    unit = tuple(s for s in strides if s.endswith("n"))
    for weight, out, by, flat in (
        (torch.bfloat16, torch.bfloat16, "mask", True),
        (torch.bfloat16, torch.bfloat16, "mask", False),
        (torch.float32, torch.bfloat16, "mask", True),
        (torch.float32, torch.float32, "mask", True),
        (torch.float16, torch.float16, "threshold", True),
        (torch.float32, torch.float32, "threshold", True),
        (torch.float32, torch.float32, "score threshold", True),
        (torch.bfloat16, None, "threshold", True),
        (torch.float32, None, "threshold", True),
    ):
        target = "mask" if out is None else POINTERS[out][1:]
        pointers = {"out_ptr": "*u8" if out is None else POINTERS[out], "weight_ptr": POINTERS[weight]}
        optional = {"mask_ptr": "*u8", "score_ptr": POINTERS[weight], "threshold_ptr": "*fp32"}
        given = {name: kind for name, kind in optional.items() if name[:-4] in by.split()}
        yield CompileSpec(
            f"mask_weight[{POINTERS[weight][1:]} to {target} by {by}{'' if flat else ', two layouts'}]",
            _select,
            pointers | given | integers,
            dict.fromkeys(optional.keys() - given.keys()) | _tile(1 if flat else 2),
            num_warps=NUM_WARPS,
            unit_strides=(*unit, "rows") if flat else unit,
        )


def _rank_specs() -> Iterator[CompileSpec]:
    strides = [f"{t}_stride_{d}" for t in ("out", "score") for d in "ajc"]
    integers = dict.fromkeys(["count", "kept", "groups_along", "behind", *strides], "i32")
    for dtype, m, flat in (
        (torch.bfloat16, 4, True),
        (torch.bfloat16, 4, False),
        (torch.float32, 4, True),
        (torch.float32, 8, True),
        (torch.bfloat16, 8, True),
        (torch.bfloat16, 16, True),
        (torch.float32, 32, True),
        (torch.bfloat16, 32, True),
        (torch.float32, 8, False),
        (torch.bfloat16, 32, False),
    ):
        yield CompileSpec(
            f"n_m_mask[{POINTERS[dtype][1:]}, m={m}{'' if flat else ', groups across'}]",
            _rank,
            {"out_ptr": "*u8", "score_ptr": POINTERS[dtype]} | integers,
            {"M": m, "FLAT": flat, "BLOCK": (BLOCK if flat else BLOCK_ACROSS) // m},
            num_warps=NUM_WARPS,
            unit_strides=("out_stride_j", "score_stride_j", "behind") if flat else ("out_stride_c", "score_stride_c"),
        )
