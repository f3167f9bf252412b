"""The cases of LQ-LoRA's operators, for `benchmarks.kernel_cases`."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from benchmarks.kernel_cases import BFLOAT16, Arguments, Case, Sizes, Step, Work
from peft_zoo.kernels.normal_float import NFConfig, quantize

CONFIG = NFConfig(4, 8, "fp32", 64, 256)


def _bitsandbytes(codes: Tensor, *rest: object) -> Step:
    """Its NF4 of the same size, dequantized; its scales are quantized too, by another rule."""
    import bitsandbytes

    count = rest[8]
    assert isinstance(count, int)
    weight = torch.randn(count // 64, 64, device=codes.device, dtype=torch.bfloat16)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return lambda: bitsandbytes.functional.dequantize_4bit(packed, state)


def cases(sizes: Sizes) -> list[Case]:
    """All of them, at one size."""

    def quantized(device: torch.device) -> Arguments:
        generator = torch.Generator(device).manual_seed(0)
        weight = torch.randn(sizes.width, sizes.width, generator=generator, device=device)
        tensor = quantize(weight, CONFIG)
        return *tensor, CONFIG.bits, CONFIG.scale_bits, CONFIG.block, CONFIG.group, weight.numel(), torch.bfloat16

    read = round(CONFIG.bits_per_value * sizes.numel / 8)
    peers = {"bitsandbytes": _bitsandbytes} if importlib.util.find_spec("bitsandbytes") else {}
    work = Work(bytes=read + 2 * sizes.numel, slots=8 * sizes.numel)
    return [
        Case(
            "nf_dequantize, 4 bits to bfloat16", ("nf_dequantize",), quantized, (work,), tolerance=BFLOAT16, peers=peers
        )
    ]
