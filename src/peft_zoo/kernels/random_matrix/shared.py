"""One copy of each random matrix on each device, shared by all layers and adapters, as large as the largest needs.

`RandLoRA`'s bases are functions of a seed (`random_basis`), and a small one is the upper left corner of a large one: so
a layer asks for what it needs, and all that ask for the same seed, kind, storage and device read the same tensors. They
live as long as somebody holds the `SharedBasis`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from peft_zoo.kernels.random_matrix.basis import UNIFORM, fill_basis, read_basis

STORAGES = ("int8", "packed2", "dense")
"""A byte a value; two bits, for ternary; or bfloat16, which holds every value exactly."""

_MATRICES = {"B": 0, "A": 1}
_lock = threading.Lock()


class BasisKey(NamedTuple):
    """Which matrices: their seed, their kind (`UNIFORM`, or the k of ternary), how they are stored, and where."""

    seed: int
    k: int
    storage: str
    device: torch.device


class SharedBasis:
    """The matrices A and B of one key; they grow when somebody needs more, and what is there stays as it is.

    Attributes:
        key: What they are.
        A: Stored, see `random_basis.read_basis`.
        B: Stored.
    """

    def __init__(self, key: BasisKey) -> None:
        self.key = key
        self.A, self.B = (torch.empty(0, 0, dtype=_dtype(key), device=key.device) for _ in range(2))
        self._columns = {"A": 0, "B": 0}

    def require(self, A: tuple[int, int], B: tuple[int, int]) -> None:
        """Make the matrices at least as large as these shapes."""
        with _lock, torch.inference_mode(False), torch.no_grad():
            self._grow("A", *A)
            self._grow("B", *B)

    def _grow(self, name: str, rows: int, columns: int) -> None:
        have = getattr(self, name)
        if len(have) >= rows and self._columns[name] >= columns:
            return
        rows, columns = max(rows, len(have)), max(columns, self._columns[name])
        setattr(self, name, _generate(self.key, _MATRICES[name], rows, columns))
        self._columns[name] = columns

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedBasis:
        return self

    def __reduce__(self) -> tuple[Callable[..., SharedBasis], tuple[Any, ...]]:
        shapes = {name: (len(getattr(self, name)), self._columns[name]) for name in _MATRICES}
        return _restored, (self.key, shapes)


_all: WeakValueDictionary[BasisKey, SharedBasis] = WeakValueDictionary()


def shared_basis(key: BasisKey) -> SharedBasis:
    """The matrices of a key; made, without entries, if nobody holds them."""
    with _lock:
        basis = _all.get(key)
        if basis is None:
            basis = _all[key] = SharedBasis(key)
        return basis


def _restored(key: BasisKey, shapes: dict[str, tuple[int, int]]) -> SharedBasis:
    basis = shared_basis(key)
    basis.require(**shapes)
    return basis


def _dtype(key: BasisKey) -> torch.dtype:
    if key.storage == "dense":
        return torch.bfloat16
    return torch.uint8 if key.k == UNIFORM or key.storage == "packed2" else torch.int8


def _generate(key: BasisKey, matrix: int, rows: int, columns: int) -> Tensor:
    width = columns if key.k == UNIFORM else math.ceil(columns / 4)
    store = torch.empty(rows, width, dtype=torch.uint8, device=key.device)
    fill_basis(store, key.seed, matrix, key.k)
    dtype = _dtype(key)
    return store if dtype == torch.uint8 else read_basis(store, key.k, rows, 0, columns, dtype)
