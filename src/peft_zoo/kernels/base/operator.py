"""Registration of operators with `torch.library`, and the choice between their PyTorch path and their Triton kernels.

An operator file reads ``reference`` (the definition, a few lines of differentiable torch) → `operator` (schema and
PyTorch path) → fake tensors and gradient → public function. Its Triton kernels lie in a sibling ``*_triton.py``, which
is imported on the first call that runs them.

The environment variable ``PEFT_ZOO_KERNELS`` is read at every call:

    auto     (default) Triton on NVIDIA GPUs of compute capability 8.0 or newer, PyTorch elsewhere
    torch    PyTorch everywhere
    triton   like auto, and also where auto prefers a PyTorch library call as faster; CPU tensors run in Triton's
             interpreter if TRITON_INTERPRET=1 is set

If the Triton kernels cannot take the arguments, the PyTorch path computes the result and the reason is logged once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("peft_zoo")

MODES = ("auto", "torch", "triton")
OLDEST_CAPABILITY = (8, 0)
OLDEST_TRITON = (3, 6)
"""Oldest version of Triton that the kernels have been compiled with."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the Triton kernels read and write; they compute in float32."""

OPERATORS: dict[str, Operator] = {}
"""Operators by name; filled when their modules are imported, see `all_operators`."""


def kernels_mode() -> str:
    """Returns the value of `PEFT_ZOO_KERNELS`; raises a ValueError if it is not one of `MODES`."""
    mode = os.environ.get("PEFT_ZOO_KERNELS", "auto")
    if mode not in MODES:
        raise ValueError(f"PEFT_ZOO_KERNELS={mode!r} is unknown; set it to one of {', '.join(MODES)}.")
    return mode


def why_not_triton(tensor: Tensor) -> str | None:
    """Returns why no Triton kernel can run on the tensor's device, or None if one can."""
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


class PreferTorch(str):
    """Reason for the PyTorch path that costs no speed, so it is logged at debug level and never as a warning."""


class Operator:
    """One operator of `torch.ops.peft_zoo`, callable like it; its attributes are the arguments of `operator`."""

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
        self.op = torch.library.custom_op(f"peft_zoo::{name}", self._body, mutates_args=mutates, schema=schema)
        self.register_fake, self.register_autograd = self.op.register_fake, self.op.register_autograd

    def __call__(self, *args: Any) -> Any:
        return self.op(*args)

    def why_not_triton(self, *args: Any) -> str | None:
        """Returns why the PyTorch path runs for these arguments, or None if the Triton kernels run."""
        if self.triton_module is None or self._refuse is None:
            return PreferTorch("it is composed of operators that choose for themselves")
        return why_not_triton(_first_tensor(args)) or self._refuse(*args)

    def run(self, *args: Any) -> Any:
        """Chooses a path and runs it without torch's dispatcher, for the bodies of other operators: no gradient."""
        tensor = _first_tensor(args)
        reason = self.why_not_triton(*args)
        if reason is not None:
            is_expected = isinstance(reason, PreferTorch) or kernels_mode() == "torch"
            _log_once(self.name, reason, is_expected or (not tensor.is_cuda and kernels_mode() == "auto"))
            return self.torch_path(*args)
        launch = getattr(importlib.import_module(str(self.triton_module)), self.name)
        with torch.cuda.device(tensor.device if tensor.is_cuda else -1):  # Triton launches on the current device
            return launch(*args)

    def _body(self, *args: Any) -> Any:
        """Runs on plain tensors: autograd, tracing and autocast are handled outside of it."""
        with torch.autocast(_first_tensor(args).device.type, enabled=False):
            return self.run(*args)


def operator(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    triton: str | None = None,
    refuse: Callable[..., str | None] | None = None,
    mutates: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Operator]:
    """Returns a decorator that registers an operator with the decorated function as its PyTorch path.

    Args:
        name: Name in `torch.ops.peft_zoo` and key in `OPERATORS`.
        schema: Arguments and results in PyTorch's schema language.
        reference: Definition in differentiable torch, with the arguments of the operator.
        triton: Name of a module in the package of the decorated function, with a function `name` that launches the
            kernels; None (default) for an operator composed of other operators.
        refuse: Takes the arguments and returns why the Triton kernels cannot take them (a dtype, a size), or None.
            Required with `triton`.
        mutates: Names of the arguments that are changed in place.
    """

    def register(torch_path: Callable[..., Any]) -> Operator:
        module = f"{torch_path.__module__.rpartition('.')[0]}.{triton}" if triton else None
        OPERATORS[name] = Operator(name, schema, torch_path, reference, module, refuse, mutates)
        return OPERATORS[name]

    return register


def all_operators() -> dict[str, Operator]:
    """Imports every module of `peft_zoo.kernels` but the Triton ones and returns all operators by name."""
    kernels = __name__.removesuffix(".base.operator")
    for module in pkgutil.walk_packages(importlib.import_module(kernels).__path__, f"{kernels}."):
        if not module.name.endswith(("_triton", ".triton_helpers")):
            importlib.import_module(module.name)
    return dict(OPERATORS)


def refuse_dtypes(*tensors: Tensor | None, allowed: tuple[torch.dtype, ...]) -> str | None:
    """Returns a refusal that names the dtypes of the tensors outside `allowed`, or None if there are none."""
    found = sorted({str(t.dtype) for t in tensors if t is not None and t.dtype not in allowed})
    return f"{', '.join(found)}: the kernels take {', '.join(map(str, allowed))}" if found else None


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    return next(a for a in args if isinstance(a, Tensor))


@functools.cache
def _log_once(name: str, reason: str, is_expected: bool) -> None:
    level = logging.DEBUG if is_expected else logging.WARNING
    logger.log(level, "%s: computed by torch instead of Triton: %s.", name, reason)
