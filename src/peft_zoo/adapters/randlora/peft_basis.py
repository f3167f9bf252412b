"""Random matrices of peft's own RandLoRA.

Peft draws A, B_1, B_2, … from torch's generator for the largest sizes of all adapted layers. The matrices depend on
these layers, on torch's version, and on whether the machine uses bfloat16 or float16. An adapter with such a basis
therefore saves sizes and dtype in its configuration and, by default, the matrices.
"""

from __future__ import annotations

import math

import torch
from accelerate.utils import is_bf16_available
from torch import Tensor, nn

from peft_zoo.adapters.base import BufferDict


def usual_dtype() -> str:
    """Returns the dtype in which peft draws on this machine."""
    return "bfloat16" if is_bf16_available() else "float16"


def draw(kind: str, r: int, largest: int, smallest: int, seed: int, dtype: str) -> tuple[Tensor, Tensor]:
    """Draws A `(r, 1, smallest)` and B `(largest, ceil(smallest / r), r)` of unit variance, as peft 0.21 does.

    `kind` is "peft", uniform in the dtype of that name, or ternary: "peft_sparse" or "peft_very_sparse", in float32.
    `largest` and `smallest` are the larger and the smaller of the largest `out` and the largest `in` of all layers.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    bases = math.ceil(smallest / r)
    if kind == "peft":

        def uniform(*shape: int) -> Tensor:
            empty = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
            return nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

        A = uniform(r, 1, smallest)
        B = torch.cat([uniform(largest, 1, r) for _ in range(bases)], dim=1)
        return A / A.std(), B / B.std()
    share = 1 / (2 * (3 if kind == "peft_sparse" else math.sqrt(smallest)))

    def ternary(*shape: int) -> Tensor:
        drawn = torch.rand(shape, generator=generator, device="cpu")
        signs = (drawn > 1 - share).float() - (drawn < share).float()
        return signs / signs.std()

    return ternary(r, 1, smallest), ternary(largest, bases, r)


class PeftProjection:
    """Random matrices of one adapter in the buffers of the model, shared by its layers."""

    def __init__(self, A: BufferDict, B: BufferDict, name: str) -> None:
        self._A, self._B, self._name = A, B, name
        self._copies: dict[torch.device, tuple[int, Tensor, Tensor]] = {}

    def matrices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns A `(r, smallest)` and B `(largest, n r)` on `device`, copied if the buffers are on another device."""
        A, B = self._A.read(self._name), self._B.read(self._name)
        if A.device != device:
            held = self._copies.get(device)
            if held is None or held[0] != A._version + B._version:
                held = self._copies[device] = (A._version + B._version, A.to(device), B.to(device))
            _, A, B = held
        return A[:, 0], B.flatten(1)
