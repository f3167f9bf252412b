"""What a benchmark case of an operator is: its arguments, the work that it cannot avoid, and its peers.

Bytes, FLOPs and instructions are the least that the algorithm needs, counted by hand. They are the denominators of the
table, so a kernel that moves more bytes appears as a slower one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[Any, ...]
Step = Callable[[], object]

DENSITY = 0.1
"""Share of kept entries in all cases of sparse matrices."""

FLOAT32 = 1e-5
"""Relative error of float32 sums."""
BFLOAT16 = 2**-8 + FLOAT32
"""Relative error of one rounding: half of the spacing, which is 2^-7 at 1."""
PRODUCT = 2**-7
"""Relative error in the norm of a whole tensor: operands, products and results are rounded to bfloat16 (2^-8 each)."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a square weight, its adapters and its inputs.

    Attributes:
        width: Input and output features.
        rank: Total rank of an adapter.
        groups: Groups of SNELL's factors.
        tokens: Rows of the input.
        adapters: Numbers of LoRAs that are merged, one case each.
    """

    width: int = 4096
    rank: int = 16
    groups: int = 2
    tokens: int = 8192
    adapters: tuple[int, ...] = (1, 4, 8)

    @property
    def numel(self) -> int:
        """Entries of the weight."""
        return self.width * self.width

    @property
    def slots(self) -> int:
        """Instructions of all lanes to compute the kernel matrix once: two for each coordinate, twelve for the rest."""
        return self.numel * (2 * self.rank + 12)


FULL = Sizes()
QUICK = Sizes(width=256, rank=8, tokens=64, adapters=(1, 3))


@dataclass(frozen=True)
class Rates:
    """Throughput of a GPU per second.

    Attributes:
        bytes: Bytes from and to memory.
        flops: FLOPs of bfloat16 products on tensor cores.
        slots: Float32 instructions of all lanes.
    """

    bytes: float
    flops: float
    slots: float


H100 = Rates(bytes=3084e9, flops=989e12, slots=132 * 128 * 1.83e9)
"""An H100 SXM: 92 % of the 3350 GB/s of its data sheet, the data sheet's 989 TFLOP/s, and 132 multiprocessors of 128
lanes at 1.83 GHz."""


@dataclass(frozen=True)
class Work:
    """Least work of one pass, in which memory traffic, products and instructions overlap.

    Attributes:
        bytes: Bytes from and to memory.
        flops: FLOPs of matrix products.
        slots: Float32 instructions of all lanes.
    """

    bytes: int = 0
    flops: int = 0
    slots: int = 0

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Returns the seconds that each kind of work takes alone; the pass takes as long as the longest."""
        return {
            "memory": self.bytes / rates.bytes,
            "products": self.flops / rates.flops,
            "instructions": self.slots / rates.slots,
        }


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        name: Name in the table.
        operators: Names of the operators that the case covers; without `run` the first one is called.
        make: Builds the arguments on a device.
        work: Least work of each pass; passes run one after the other.
        tolerance: Largest relative error against the definition in float64.
        by_norm: Whether the error is that of a result's norm; if not, each entry's, relative to `|entry| + rms`.
        outliers: Number of entries that may have a larger error: those that float32 cannot tell from a threshold.
        peers: Other implementations by name; each takes the arguments and returns a step to time.
        run: Function to call instead of the operator.
        reference: Definition to compare with instead of the operator's.
    """

    name: str
    operators: tuple[str, ...]
    make: Callable[[torch.device], Arguments]
    work: tuple[Work, ...]
    tolerance: float = 0.0
    by_norm: bool = False
    outliers: int = 0
    peers: Mapping[str, Callable[..., Step]] = field(default_factory=dict)
    run: Callable[..., Any] | None = None
    reference: Callable[..., Any] | None = None

    @property
    def bytes(self) -> int:
        """Bytes moved by all passes."""
        return sum(work.bytes for work in self.work)

    def floor(self, rates: Rates) -> tuple[float, str]:
        """Returns the least seconds of all passes, and the kind of work that bounds the longest pass."""
        passes = [max((s, bound) for bound, s in work.seconds(rates).items()) for work in self.work]
        return sum(seconds for seconds, _ in passes), max(passes)[1]


def random_tensor(*shape: int, device: torch.device, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws normal values times `scale` with a seed that depends on the shape."""
    generator = torch.Generator(device).manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)


def random_weight(sizes: Sizes, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Draws the square weight."""
    return random_tensor(sizes.width, sizes.width, device=device, scale=sizes.width**-0.5, dtype=dtype)


def random_tokens(sizes: Sizes, device: torch.device, seed: int = 0) -> Tensor:
    """Draws inputs of the layer in bfloat16, `(tokens, width)`, other ones for each `seed`."""
    return random_tensor(sizes.tokens + seed, sizes.width, device=device, dtype=torch.bfloat16)[seed:]
