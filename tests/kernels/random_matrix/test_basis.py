"""Random matrices from a seed: fixed bits, moments, storage, products and sharing."""

from __future__ import annotations

import copy
import gc
import hashlib
import math
import pickle

import pytest
import torch
from torch import Tensor

from peft_zoo.kernels.random_matrix import shared as module
from peft_zoo.kernels.random_matrix.basis import UNIFORM, fill_basis, fill_basis_reference, read_basis, unit
from peft_zoo.kernels.random_matrix.philox import philox
from peft_zoo.kernels.random_matrix.products import basis_product
from peft_zoo.kernels.random_matrix.shared import BasisKey, shared_basis

CPU = torch.device("cpu")


def stored(rows: int, columns: int, k: int, seed: int = 0, matrix: int = 0, first_row: int = 0) -> Tensor:
    store = torch.empty(rows, columns if k == UNIFORM else math.ceil(columns / 4), dtype=torch.uint8)
    fill_basis(store, seed, matrix, k, first_row)
    return store


@pytest.mark.parametrize(
    ("k", "digest"), [(UNIFORM, "834921f0dd0ef5a0"), (43, "e638d4e3da516312"), (5, "83881673e9c7e33a")]
)
def test_the_bits_of_a_release_are_those_of_every_release(k: int, digest: str) -> None:
    stores = [stored(70, 132, k, seed=2**40 + 7, matrix=matrix) for matrix in (0, 1)]
    assert hashlib.sha256(b"".join(s.numpy().tobytes() for s in stores)).hexdigest()[:16] == digest


def test_an_entry_is_the_byte_that_the_definition_names() -> None:
    store = stored(3, 40, UNIFORM, seed=9, matrix=1)
    words = philox(9, torch.tensor(37 // 16), torch.tensor(2), 1)
    assert int(store[2, 37]) == (int(words[37 % 16 // 4]) >> 8 * (37 % 4)) & 255


@pytest.mark.parametrize("k", [UNIFORM, 43, 1])
def test_a_corner_is_the_smaller_matrix(k: int) -> None:
    large = read_basis(stored(40, 100, k), k, 40, 0, 100, torch.float32)
    for rows, start, stop in ((1, 0, 1), (7, 3, 50), (40, 17, 18), (9, 8, 100)):
        small = stored(rows, stop, k)
        found = read_basis(small, k, rows, start, stop, torch.bfloat16)
        assert torch.equal(found.float(), large[:rows, start:stop])
    assert torch.equal(stored(5, 100, k, first_row=20), stored(40, 100, k)[20:25])


@pytest.mark.parametrize("k", [UNIFORM, 43, 8])
def test_moments(k: int) -> None:
    values = unit(k) * read_basis(stored(1000, 1000, k), k, 1000, 0, 1000, torch.float64)
    assert values.mean().abs() < 3 / 1000
    assert abs(values.std().item() - 1) < (1e-3 if k == UNIFORM else 5e-3)
    zeros = (values == 0).double().mean().item()
    assert abs(zeros - (0 if k == UNIFORM else 1 - k / 128)) < 2e-3


@pytest.mark.parametrize("k", [UNIFORM, 43])
def test_every_dtype_holds_the_values_exactly(k: int) -> None:
    store = stored(20, 64, k)
    exact = read_basis(store, k, 20, 0, 64, torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = read_basis(store, k, 20, 0, 64, dtype)
        assert found.dtype == dtype and torch.equal(found.double(), exact)


def test_seeds_and_matrices_differ() -> None:
    stores = [stored(8, 64, UNIFORM, seed, matrix) for seed in (0, 1, -1, 2**62) for matrix in (0, 1)]
    assert len({s.numpy().tobytes() for s in stores}) == len(stores)


def test_large_matrices_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_zoo.kernels.random_matrix import basis as random_basis

    monkeypatch.setattr(random_basis, "_CHUNK", 64)
    assert torch.equal(stored(9, 50, 43), fill_basis_reference(torch.empty(9, 13, dtype=torch.uint8), 0, 0, 43, 0))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"store": torch.empty(3, 4)}, "store is torch.float32"),
        ({"store": torch.empty(4, 3, dtype=torch.uint8).t()}, "store is torch.uint8"),
        ({"seed": 2**63}, "seed=9223372036854775808"),
        ({"k": 128}, "k=128"),
        ({"matrix": -1}, "matrix=-1"),
        ({"first_row": -1}, "first_row=-1"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], named: str) -> None:
    arguments = {"store": torch.empty(3, 4, dtype=torch.uint8), "seed": 0, "matrix": 0, "k": 0, "first_row": 0}
    with pytest.raises(ValueError, match=named):
        fill_basis(**(arguments | change))  # type: ignore[arg-type]


def test_a_shared_basis_grows_and_keeps_its_entries() -> None:
    key = BasisKey(123, 43, "packed2", CPU)
    basis = shared_basis(key)
    basis.reserve(A=(4, 10), B=(20, 6))
    before = basis.B.clone()
    assert shared_basis(key) is basis and copy.deepcopy(basis) is basis and pickle.loads(pickle.dumps(basis)) is basis
    shared_basis(key).reserve(A=(2, 30), B=(50, 9))
    assert basis.A.shape == (4, 8) and basis.B.shape == (50, 3)
    old, new = (read_basis(store, 43, 20, 0, 6, torch.float32) for store in (before, basis.B))
    assert torch.equal(old, new)
    same = basis.B
    basis.reserve(A=(1, 1), B=(50, 9))
    assert basis.B is same


def test_an_unreferenced_basis_is_freed() -> None:
    key = BasisKey(321, UNIFORM, "int8", CPU)
    basis = shared_basis(key)
    pickled = pickle.dumps(basis)
    assert key in module._registry
    del basis
    gc.collect()
    assert key not in module._registry
    assert pickle.loads(pickled).key == key


@pytest.mark.parametrize("k", [UNIFORM, 43])
def test_every_storage_holds_the_same_values(k: int) -> None:
    values, sizes = [], []
    for storage in ("int8", "dense") if k == UNIFORM else ("int8", "packed2", "dense"):
        basis = shared_basis(BasisKey(5, k, storage, CPU))
        basis.reserve(A=(3, 20), B=(40, 24))
        values.append(read_basis(basis.B, k, 40, 1, 23, torch.float32))
        sizes.append(basis.B.nbytes)
    assert all(torch.equal(v, values[0]) for v in values)
    assert sorted(sizes) == ([960, 1920] if k == UNIFORM else [240, 960, 1920])


def test_a_product_is_the_same_for_every_storage() -> None:
    x, products = torch.randn(5, 24, dtype=torch.float64), []
    for storage in ("int8", "packed2", "dense"):
        basis = shared_basis(BasisKey(5, 43, storage, CPU))
        basis.reserve(A=(3, 20), B=(40, 24))
        products.append(basis_product(x, basis.B, 43, (40, 24), True, 64))
    assert all(torch.equal(product, products[0]) for product in products)


def test_a_basis_made_in_inference_mode_can_be_used_in_training() -> None:
    with torch.inference_mode():
        basis = shared_basis(BasisKey(99, UNIFORM, "int8", CPU))
        basis.reserve(A=(3, 20), B=(40, 24))
    assert not basis.A.is_inference()
