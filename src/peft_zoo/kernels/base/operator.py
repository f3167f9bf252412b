"""How every operator is made: a definition, a torch path for any device, Triton kernels for NVIDIA GPUs, one switch.

An operator file reads ``reference`` (the definition, a few lines of differentiable torch) → `operator` (schema and the
torch path) → shapes for tracing and the gradient → the public function. Its Triton kernels live in a sibling
``<name>_triton.py``, which is imported when they are first wanted.

``PEFT_ZOO_KERNELS`` decides, at every call, what runs:

    auto     (default) Triton on NVIDIA GPUs of compute capability 8.0 or newer, torch elsewhere
    torch    torch everywhere
    triton   as auto, also where auto finds the library's products faster; and tensors on the CPU go through Triton's
             interpreter where TRITON_INTERPRET=1 is set

Where Triton is refused, the torch path computes the same result, and one line of the log says why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("peft_zoo")

MODES = ("auto", "torch", "triton")
OLDEST_CAPABILITY = (8, 0)
OLDEST_TRITON = (3, 6)
"""The oldest that the kernels were compiled with."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What the Triton kernels read and write; they compute in float32."""

OPERATORS: dict[str, Operator] = {}
"""All operators by name; filled as their modules are imported, see `all_operators`."""


def kernels_mode() -> str:
    """The value of `PEFT_ZOO_KERNELS`.

    Raises:
        ValueError: If it is not one of `MODES`.
    """
    mode = os.environ.get("PEFT_ZOO_KERNELS", "auto")
    if mode not in MODES:
        raise ValueError(f"PEFT_ZOO_KERNELS={mode!r} is unknown; set it to one of {', '.join(MODES)}.")
    return mode


def why_not_triton(tensor: Tensor) -> str | None:
    """Why no Triton kernel can run on this tensor's device, or None if one can."""
    mode, device = kernels_mode(), tensor.device
    if mode == "torch":
        return "PEFT_ZOO_KERNELS=torch"
    interpreted = mode == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        return f"the tensors are on {device.type}, Triton kernels need an NVIDIA GPU"
    return _why_not_package() or (_why_not_gpu(device.index or 0) if device.type == "cuda" else None)


@functools.cache
def _why_not_package() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    version = importlib.import_module("triton").__version__
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON:
        return f"triton is {version}, {'.'.join(map(str, OLDEST_TRITON))} is needed"
    return None


@functools.cache
def _why_not_gpu(index: int) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are tuned for NVIDIA GPUs, this one is AMD's"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        return f"the GPU has compute capability {capability}, {OLDEST_CAPABILITY} is needed"
    return None


class Choice(str):
    """A reason to take the torch path that is no loss: it is as good, or there is nothing to do."""


class Operator:
    """One operator of `torch.ops.peft_zoo`, callable like it.

    Attributes:
        name: Its name in `torch.ops.peft_zoo`.
        reference: The definition in plain torch, differentiable; takes what the operator takes.
        torch_path: What runs without Triton.
        triton_module: Module whose function `name` runs with Triton; None for an operator made of others, which choose
            for themselves.
        mutates: Names of the arguments it changes; an operator that changes any has no gradient.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        torch_path: Callable[..., Any],
        reference: Callable[..., Any],
        triton_module: str | None,
        refuse: Callable[..., str | None] | None,
        mutates: tuple[str, ...],
    ) -> None:
        self.name, self.reference, self.torch_path = name, reference, torch_path
        self.triton_module, self.mutates, self._refuse = triton_module, mutates, refuse
        self.op = torch.library.custom_op(f"peft_zoo::{name}", self._run, mutates_args=mutates, schema=schema)
        self.register_fake, self.register_autograd = self.op.register_fake, self.op.register_autograd

    def __call__(self, *args: Any) -> Any:
        return self.op(*args)

    def why_not_triton(self, *args: Any) -> str | None:
        """Why these arguments are left to the torch path, or None if the Triton kernels take them."""
        if self.triton_module is None or self._refuse is None:
            return Choice("it is made of operators that choose for themselves")
        return why_not_triton(_first_tensor(args)) or self._refuse(*args)

    def _run(self, *args: Any) -> Any:
        """The body: it sees plain tensors, nothing in it is recorded, traced or autocast."""
        tensor = _first_tensor(args)
        with torch.autocast(tensor.device.type, enabled=False):
            reason = self.why_not_triton(*args)
            if reason is not None:
                by_choice = isinstance(reason, Choice) or kernels_mode() == "torch"
                _say_once(self.name, reason, by_choice or (not tensor.is_cuda and kernels_mode() == "auto"))
                return self.torch_path(*args)
            run = getattr(importlib.import_module(str(self.triton_module)), self.name)
            with torch.cuda.device(tensor.device if tensor.is_cuda else -1):  # Triton launches on the current device
                return run(*args)


def operator(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    triton: str | None = None,
    refuse: Callable[..., str | None] | None = None,
    mutates: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator that makes an operator of its torch path and enters it into `OPERATORS`.

    Args:
        name: Name in `torch.ops.peft_zoo`.
        schema: Arguments and results in PyTorch's schema language.
        reference: The definition.
        triton: Module of `peft_zoo.kernels` with a function `name` that launches the Triton kernels; none for an
            operator that is made of others.
        refuse: Says of the arguments why the kernels cannot take them (a dtype, a size), or None; goes with `triton`.
        mutates: Names of arguments that are changed in place.
    """

    def make(torch_path: Callable[..., Any]) -> Operator:
        module = f"{__package__}.{triton}" if triton else None
        OPERATORS[name] = Operator(name, schema, torch_path, reference, module, refuse, mutates)
        return OPERATORS[name]

    return make


def all_operators() -> dict[str, Operator]:
    """Every operator by name, the modules that define them imported first."""
    for path in sorted(importlib.import_module(__package__ or "").__path__):
        for file in sorted(os.listdir(path)):
            if file.endswith(".py") and not file.endswith("_triton.py"):
                importlib.import_module(f"{__package__}.{file[:-3]}")
    return dict(OPERATORS)


def refuse_dtypes(*tensors: Tensor | None, allowed: tuple[torch.dtype, ...]) -> str | None:
    """The usual refusal: a tensor has a dtype that the kernels do not compute in."""
    found = sorted({str(t.dtype) for t in tensors if t is not None and t.dtype not in allowed})
    return f"{', '.join(found)}: the kernels take {', '.join(map(str, allowed))}" if found else None


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    return next(a for a in args if isinstance(a, Tensor))


@functools.cache
def _say_once(name: str, reason: str, expected: bool) -> None:
    level = logging.DEBUG if expected else logging.WARNING
    logger.log(level, "%s: computed by torch instead of Triton: %s.", name, reason)
