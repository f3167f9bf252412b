"""Shares one copy of each random matrix per device among all layers and adapters.

RandLoRA's matrices are computed from a seed (`basis`), and a smaller one is the upper left corner of a larger one.
Layers that request the same seed, distribution, storage and device read the same tensors, which grow to the largest
requested shape. They are freed with the last reference to their `SharedBasis`.
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
"""Ways to keep values in memory: one byte, two bits (ternary only), or bfloat16, which is exact for every value."""

_MATRICES = {"B": 0, "A": 1}
_lock = threading.Lock()  # of `_registry` and of growing a basis


class BasisKey(NamedTuple):
    """Identity of a shared basis.

    Attributes:
        seed: Seed of both matrices, a signed 64-bit integer.
        k: Distribution: `basis.UNIFORM`, or the k of ternary.
        storage: One of `STORAGES`.
        device: Device of the tensors.
    """

    seed: int
    k: int
    storage: str
    device: torch.device


class SharedBasis:
    """Stored random matrices A and B of one key. They grow on demand; existing entries never change."""

    def __init__(self, key: BasisKey) -> None:
        self.key = key
        self.A, self.B = (torch.empty(0, 0, dtype=_dtype(key), device=key.device) for _ in range(2))
        self._columns = {"A": 0, "B": 0}
        self._covering: dict[int, tuple[Tensor, Tensor]] = {}  # by rows: the A that it was made from, and the result

    def covering(self, rows: int) -> Tensor:
        """Returns the first rows of A, stored as A, with a non-zero value in every column.

        Where column p is zero, so that feature p could never change, row `p mod rows` gets `(-1)^(p // rows)`. The
        result for fewer columns is the left part of that for more.
        """
        with _lock, torch.inference_mode(False), torch.no_grad():
            source, found = self._covering.get(rows, (None, None))
            if found is None or source is not self.A:
                found = _cover(self.A[:rows], self.key.k, self._columns["A"])
                self._covering[rows] = self.A, found
            return found

    def reserve(self, A: tuple[int, int], B: tuple[int, int]) -> None:
        """Grows the matrices to at least these shapes `(rows, columns)`, in values."""
        with _lock, torch.inference_mode(False), torch.no_grad():
            self._grow("A", *A)
            self._grow("B", *B)

    def _grow(self, name: str, rows: int, columns: int) -> None:
        """Generates a matrix anew if it has too few rows or columns; existing entries keep their values."""
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
        return _restore, (self.key, shapes)


_registry: WeakValueDictionary[BasisKey, SharedBasis] = WeakValueDictionary()


def shared_basis(key: BasisKey) -> SharedBasis:
    """Returns the basis of a key; a new one has empty matrices, see `SharedBasis.reserve`."""
    with _lock:
        basis = _registry.get(key)
        if basis is None:
            basis = _registry[key] = SharedBasis(key)
        return basis


def _restore(key: BasisKey, shapes: dict[str, tuple[int, int]]) -> SharedBasis:
    """Rebuilds a pickled basis from its key and the sizes of its matrices."""
    basis = shared_basis(key)
    basis.reserve(**shapes)
    return basis


def _dtype(key: BasisKey) -> torch.dtype:
    """Dtype in which the matrices of a basis are stored."""
    if key.storage == "dense":
        return torch.bfloat16
    return torch.uint8 if key.k == UNIFORM or key.storage == "packed2" else torch.int8


def _generate(key: BasisKey, matrix: int, rows: int, columns: int) -> Tensor:
    """Generates `rows` x `columns` of one matrix of a basis, in its storage format."""
    width = columns if key.k == UNIFORM else math.ceil(columns / 4)
    store = torch.empty(rows, width, dtype=torch.uint8, device=key.device)
    fill_basis(store, key.seed, matrix, key.k)
    dtype = _dtype(key)
    return store if dtype == torch.uint8 else read_basis(store, key.k, rows, 0, columns, dtype)


def _cover(A: Tensor, k: int, columns: int) -> Tensor:
    """Returns a copy of a stored ternary matrix in which no column is zero; see `SharedBasis.covering`."""
    rows = len(A)
    zero = (read_basis(A, k, rows, 0, columns, torch.float32) == 0).all(0).nonzero()[:, 0]
    row, value = zero % rows, 1 - 2 * (zero // rows % 2)
    if A.dtype != torch.uint8:
        return A.clone().index_put_((row, zero), value.to(A.dtype))
    added = value << 2 * (zero % 4)  # to the code 1 of a zero; several of one byte may change
    return A.to(torch.int64).index_put_((row, zero // 4), added, accumulate=True).to(torch.uint8)
