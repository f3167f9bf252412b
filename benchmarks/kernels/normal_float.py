"""The cases of LQ-LoRA's operators."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import BFLOAT16, PRODUCT, Arguments, Case, Sizes, Step, Work, random_tensor
from peft_zoo.kernels.normal_float.quantize import NFConfig, NFTensor, quantize

CONFIG = NFConfig(4, 8, "fp32", 64, 256)
TOKENS, RANK = 1, 64


def _nf4(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Any]:
    """A random matrix in bitsandbytes' NF4 of the same size; its scales are quantized too, by another rule."""
    import bitsandbytes

    weight = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    return bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)


def _bitsandbytes(codes: Tensor, *rest: Any) -> Step:
    import bitsandbytes

    packed, state = _nf4(rest[8] // 64, 64, codes.device)
    return lambda: bitsandbytes.functional.dequantize_4bit(packed, state)


def _bitsandbytes_linear(x: Tensor, *rest: Any) -> Step:
    """bitsandbytes' product with a LoRA added as peft adds it."""
    import bitsandbytes

    low, B, (rows, columns) = rest[5], rest[6], rest[12:14]
    packed, state = _nf4(rows, columns, x.device)
    return lambda: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state) + F.linear(low, B)


def _dense(x: Tensor, *rest: Any) -> Step:
    low, B, (rows, columns) = rest[5], rest[6], rest[12:14]
    weight = torch.randn(rows, columns, device=x.device, dtype=x.dtype)
    return lambda: F.linear(x, weight) + F.linear(low, B)


def _bitsandbytes_merge(codes: Tensor, *rest: Any) -> Step:
    import bitsandbytes

    A, B, scaling = rest[4:7]
    packed, state = _nf4(len(B), A.shape[1], codes.device)
    return lambda: bitsandbytes.functional.dequantize_4bit(packed, state).addmm_(B, A, alpha=scaling)


def _peer(step: Callable[..., Step]) -> dict[str, Callable[..., Step]]:
    return {"bitsandbytes": step} if importlib.util.find_spec("bitsandbytes") else {}


def cases(sizes: Sizes) -> list[Case]:
    """Returns all cases at one size."""
    width, N = sizes.width, sizes.numel

    def tensor(device: torch.device) -> NFTensor:
        return quantize(random_tensor(width, width, device=device, scale=width**-0.5), CONFIG)

    def factor(rows: int, columns: int, device: torch.device) -> Tensor:
        return random_tensor(rows, columns, device=device, scale=width**-0.5, dtype=torch.bfloat16)

    def restored(device: torch.device) -> Arguments:
        return *tensor(device), *CONFIG.integers, N, torch.bfloat16

    def linear(device: torch.device) -> Arguments:
        x, low = factor(TOKENS, width, device), factor(TOKENS, RANK, device)
        return x, *tensor(device), low, factor(width, RANK, device), None, *CONFIG.integers, width, width, False

    def merged(device: torch.device) -> Arguments:
        A, B = factor(RANK, width, device), factor(width, RANK, device)
        return *tensor(device), A, B, 0.5, *CONFIG.integers, torch.bfloat16

    read, factors = round(CONFIG.bits_per_value * N / 8), 2 * RANK * width
    restore, multiply = Work(read + 2 * N, slots=8 * N), Work(read + factors, slots=8 * N)
    merge = Work(read + 2 * N + 2 * factors, 2 * N * RANK, 8 * N)
    return [
        Case(
            "nf_dequantize, 4 bits to bfloat16",
            ("nf_dequantize",),
            restored,
            (restore,),
            tolerance=BFLOAT16,
            peers=_peer(_bitsandbytes),
        ),
        Case(
            f"nf_linear, {TOKENS} token, r={RANK}",
            ("nf_linear",),
            linear,
            (multiply,),
            tolerance=PRODUCT,
            by_norm=True,
            peers=_peer(_bitsandbytes_linear) | {"bfloat16": _dense},
        ),
        Case(
            f"nf_merge, r={RANK}", ("nf_merge",), merged, (merge,), tolerance=BFLOAT16, peers=_peer(_bitsandbytes_merge)
        ),
    ]
