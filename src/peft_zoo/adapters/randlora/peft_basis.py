"""The random matrices of peft's own RandLoRA: what they are drawn from, and one place where a model keeps them.

Peft draws both from torch's generator, in the order A, B_1, B_2, …, over the largest sizes of all adapted layers, so
they depend on which layers those are, on torch's version, and on whether 16-bit numbers are bfloat16 or float16. An
adapter of ours therefore writes the sizes and the dtype into its configuration, and by default saves the matrices.
"""

from __future__ import annotations

import math

import torch
from accelerate.utils import is_bf16_available
from torch import Tensor, nn

from peft_zoo.adapters.base import BufferDict

__all__: list[str] = []


def usual_dtype() -> str:
    """The dtype in which peft draws on this machine."""
    return "bfloat16" if is_bf16_available() else "float16"


def draw(kind: str, r: int, largest: int, smallest: int, seed: int, dtype: str) -> tuple[Tensor, Tensor]:
    """A `(r, 1, smallest)` and B `(largest, ceil(smallest / r), r)` of unit variance, as peft 0.21 draws them.

    Args:
        kind: `"peft"` (uniform), `"peft_sparse"` or `"peft_very_sparse"` (ternary, drawn in float32).
        r: Rank of a base.
        largest: Largest size of all adapted layers.
        smallest: Largest of their smaller sizes, as peft counts: the smaller of the largest `in` and the largest `out`.
        seed: Of torch's generator on the CPU.
        dtype: In which the uniform kind is drawn.
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
    """One adapter's matrices, read from the buffers of the model by all its layers."""

    def __init__(self, A: BufferDict, B: BufferDict, name: str) -> None:
        self._A, self._B, self._name = A, B, name
        self._copies: dict[torch.device, tuple[int, Tensor, Tensor]] = {}

    def matrices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A `(r, smallest)` and B `(largest, n r)` on a device; a layer on another one than the model's gets a copy."""
        A, B = self._A[self._name], self._B[self._name]
        if A.device != device:
            held = self._copies.get(device)
            if held is None or held[0] != A._version + B._version:
                held = self._copies[device] = (A._version + B._version, A.to(device), B.to(device))
            _, A, B = held
        return A[:, 0], B.flatten(1)
