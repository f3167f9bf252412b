"""peft's LoftQ on a machine without a GPU, for the benchmarks that LQ-LoRA is compared in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

BITS = 4 + 32 / 64
"""Of a number in the base that LoftQ counts on: NF4 in blocks of 64, each with a scale in float32. peft itself leaves
the base as it was, 16 or 32 bits a number, with rounded values."""


class _CpuForCuda(TorchFunctionMode):
    """Whoever asks for the device "cuda" gets the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _moved(value) for name, value in (kwargs or {}).items()}
        return func(*map(_moved, args), **kwargs)


def _moved(value: Any) -> Any:
    named = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"
    return torch.device("cpu") if named else value


@contextlib.contextmanager
def loftq_anywhere() -> Iterator[None]:
    """Lets `peft.utils.loftq_utils.loftq_init` run where there is no GPU.

    It moves the weight to "cuda" by name, although everything it does, bitsandbytes' NF4 and an SVD, runs on a CPU too.
    So here that name stands for the CPU, where torch has no GPU. Nothing else is changed: the figures are those of
    peft's own code, and its times are what the same operations take on this machine.
    """
    with contextlib.nullcontext() if torch.cuda.is_available() else _CpuForCuda():
        yield
