"""The threshold against its definition by sorting: any values, any tiling, any size, and never a look from the host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_zoo.kernels.sparse import threshold as module
from peft_zoo.kernels.sparse.threshold import (
    KEEP_ALL,
    magnitude_threshold,
    magnitude_threshold_reference,
    tiled_threshold,
)

DTYPES = (torch.float32, torch.float64)


def select(w: Tensor, num_kept: int, tile: int | None = None) -> Tensor:
    w = w.flatten()
    return tiled_threshold(lambda: w.split(tile or w.numel()), w.numel(), torch.tensor(num_kept))


@st.composite
def arrays(draw: st.DrawFn) -> Tensor:
    """Few distinct values (ties), zeros of both signs, denormals, infinities: whatever numpy can hold but NaN."""
    dtype = draw(st.sampled_from(["float32", "float64"]))
    tiny = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-40, float("inf"), 2.5]
    width = 32 if dtype == "float32" else 64
    elements = draw(
        st.sampled_from([st.sampled_from(tiny), st.floats(width=width, allow_nan=False, allow_subnormal=True)])
    )
    if dtype == "float32":
        elements = elements.map(lambda v: float(torch.tensor(v, dtype=torch.float32)))
    return torch.from_numpy(draw(hnp.arrays(dtype, st.sampled_from([1, 2, 7, 63, 64, 200]), elements=elements)))


@given(arrays(), st.data())
def test_equals_the_definition(w: Tensor, data: st.DataObject) -> None:
    num_kept = data.draw(st.integers(-1, w.numel() + 1))
    tile = data.draw(st.sampled_from([None, 1, 8, 9, 64]))
    found = select(w, num_kept, tile)
    assert found.dtype == w.dtype and found.shape == ()
    assert torch.equal(found, magnitude_threshold_reference(w, num_kept))
    kept = int((w.abs() > found).sum())
    assert kept <= max(num_kept, 0) or num_kept > w.numel()
    if w.abs().unique().numel() == w.numel():
        assert kept == min(max(num_kept, 0), w.numel())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 1000, 4096])
def test_keeps_exactly_as_many_as_asked(dtype: torch.dtype, size: int) -> None:
    w = torch.randn(size, dtype=dtype)
    for num_kept in {0, 1, size // 10, size - 1, size}:
        assert int((w.abs() > select(w, num_kept, 100)).sum()) == num_kept


def test_limits() -> None:
    w = torch.tensor([3.0, -5.0, 0.0])
    assert select(w, 3) == KEEP_ALL and select(w, 9) == KEEP_ALL
    assert select(w, 0) == 5.0 and select(w, -2) == 5.0


def test_exact_above_two_to_the_24() -> None:
    size = 2**24 + 9
    w = torch.arange(size, dtype=torch.int32).flip(0).view(torch.float32)  # distinct denormals and small normals
    for num_kept in (1, 2**24 + 1, size - 1):
        threshold = select(w, num_kept, 2**21)
        assert int(threshold.view(torch.int32)) == size - num_kept - 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_takes_a_place_and_nothing_is_kept_beyond(dtype: torch.dtype) -> None:
    w = torch.tensor([1.0, float("nan"), -3.0, -float("nan"), 2.0], dtype=dtype)
    assert select(w, 3) == 2.0  # two NaN and the 3
    assert int((w.abs() > select(w, 3)).sum()) == 1
    assert select(w, 1).isnan() and int((w.abs() > select(w, 1)).sum()) == 0


def test_a_single_tile_is_computed_once_and_several_once_per_pass() -> None:
    w, calls = torch.randn(64), []

    def tiles(size: int) -> Iterable[Tensor]:
        for tile in w.split(size):
            calls.append(len(tile))
            yield tile

    tiled_threshold(lambda: tiles(64), 64, torch.tensor(5))
    assert calls == [64]
    calls.clear()
    tiled_threshold(lambda: tiles(32), 64, torch.tensor(5))
    assert calls == [32] * 4


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.add(func.name())
        return func(*args, **(kwargs or {}))


def test_an_accelerator_is_never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = {"aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::masked_select", "aten::sort"}
    w, num_kept = torch.randn(1000), torch.tensor(77)
    with Recorder() as here:
        expected = tiled_threshold(lambda: w.split(100), 1000, num_kept)
    assert "aten::_local_scalar_dense" not in here.ops
    monkeypatch.setattr(module, "_on_host", lambda tensor: False)
    with Recorder() as there:
        found = tiled_threshold(lambda: w.split(100), 1000, num_kept)
    assert not there.ops & waiting, there.ops & waiting
    assert torch.equal(found, expected)
    meta = tiled_threshold(lambda: w.to("meta").split(100), 1000, num_kept.to("meta"))  # has no values to wait for
    assert meta.shape == ()


@settings(max_examples=30)
@given(arrays(), st.integers(0, 200))
def test_the_path_of_accelerators_equals_the_definition(w: Tensor, num_kept: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_on_host", lambda tensor: False)
        assert torch.equal(select(w, num_kept, 16), magnitude_threshold_reference(w, num_kept))


def test_bad_tiles() -> None:
    with pytest.raises(ValueError, match="yielded nothing"):
        tiled_threshold(list, 0, torch.tensor(0))
    with pytest.raises(ValueError, match="bfloat16"):
        select(torch.ones(3, dtype=torch.bfloat16), 1)


# --- of a given matrix ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_of_a_matrix(dtype: torch.dtype) -> None:
    w = torch.randn(30, 40).to(dtype)
    for arrangement in (w, w.t(), w[::2, ::3], w.flatten(), w[0, 0]):
        for count in (0, 1, arrangement.numel() // 2, arrangement.numel()):
            found = magnitude_threshold(arrangement, torch.tensor(count))
            assert torch.equal(found, magnitude_threshold_reference(arrangement, count))
            assert found.dtype == torch.promote_types(dtype, torch.float32)


def test_where_to_look_first_does_not_change_the_result() -> None:
    w = torch.randn(30, 40)
    expected = magnitude_threshold(w, torch.tensor(100))
    for last in (float(expected), 0.0, -1.0, float("nan")):
        assert torch.equal(magnitude_threshold(w, torch.tensor(100), torch.tensor(last)), expected)


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (torch.ones(0, 3), r"w has shape \(0, 3\); magnitude_threshold needs at least one element"),
        (torch.ones(3, dtype=torch.int32), "w is torch.int32; magnitude_threshold needs a floating-point matrix"),
    ],
)
def test_bad_matrix(w: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        magnitude_threshold(w, torch.tensor(1))
