"""Runs peft's LoftQ on a machine without a GPU, for comparison with LQ-LoRA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

BITS = 4 + 32 / 64
"""Bits per weight of the base that LoftQ assumes: NF4 in blocks of 64, each with a scale in float32. peft itself keeps
the rounded base in 16 or 32 bits per weight."""


class _CpuForCuda(TorchFunctionMode):
    """Replaces the device "cuda" by the CPU in calls of torch functions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _moved(value) for name, value in (kwargs or {}).items()}
        return func(*map(_moved, args), **kwargs)


def _moved(value: Any) -> Any:
    named = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"
    return torch.device("cpu") if named else value


@contextlib.contextmanager
def loftq_anywhere() -> Iterator[None]:
    """Lets `peft.utils.loftq_utils.loftq_init` run without a GPU, in the block.

    It moves the weight to "cuda" by name, although its operations, bitsandbytes' NF4 and an SVD, run on a CPU too. In
    the block that name means the CPU if torch has no GPU. Nothing else changes: results and times are those of peft's
    code on this machine.
    """
    with contextlib.nullcontext() if torch.cuda.is_available() else _CpuForCuda():
        yield
