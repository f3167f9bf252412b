"""Thresholds by Triton: exact for every matrix and every count, from scratch and from any warm start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_zoo.kernels.base.kernel_spec import KernelSpec
from peft_zoo.kernels.base.operator import OPERATORS
from peft_zoo.kernels.snell.weight import kernelized_threshold, kernelized_weight
from peft_zoo.kernels.sparse import threshold_triton as module
from peft_zoo.kernels.sparse.threshold import WARM_BITS, magnitude_threshold, magnitude_threshold_reference
from tests.kernels.cases import each_shape_with, full_only

SHAPES = [(1, 1), (63, 64), (63, 1000), (1000, 3), (3, 4097)]


def kept(count: int, device: str) -> Tensor:
    return torch.tensor(count, device=device)


@pytest.mark.parametrize(
    ("shape", "dtype"), each_shape_with([torch.float32, torch.bfloat16, torch.float16], SHAPES), ids=str
)
def test_equals_the_definition(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    w = torch.randn(shape, device=device).to(dtype)
    assert OPERATORS["magnitude_threshold"].why_not_triton(w, kept(1, device), None) is None
    for arrangement, count in ((w, 1), (w.t().contiguous().t(), w.numel() // 3)):
        found = magnitude_threshold(arrangement, kept(count, device))
        assert found.dtype == torch.float32 and torch.equal(found, magnitude_threshold_reference(w, count))


@pytest.mark.parametrize("count", [3000, 4032, *full_only(0, 1, 4031, 4037, -1)])
def test_counts(count: int, device: str) -> None:
    w = torch.randn(2, 63, 32, device=device)
    for arrangement in (w, w.flatten(), w.transpose(0, 2)):
        found = magnitude_threshold(arrangement, kept(count, device))
        assert torch.equal(found, magnitude_threshold_reference(w, count))


def test_ties_zeros_and_values_that_are_not_finite(device: str) -> None:
    inf, nan = float("inf"), float("nan")
    w = torch.tensor([[0.0, -0.0, 1e-45, 2.0, -2.0, 2.0], [inf, -inf, nan, 1.0, -1.0, 3e38]], device=device)
    for count in (0, 1, 2, 4, 7, 11, 12):
        expected = magnitude_threshold_reference(w, count)
        found = magnitude_threshold(w, kept(count, device))
        assert torch.equal(found, expected) or (found.isnan() and expected.isnan())


@pytest.fixture
def always_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WARM_ELEMENTS", 0)


@pytest.mark.usefixtures("always_warm")
@pytest.mark.parametrize("source", ["given", "factors"])
def test_a_warm_start_never_changes_the_result(source: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    A, B = torch.randn(2, 45, 3, device=device), torch.randn(2, 150, 3, device=device)
    spec = KernelSpec()
    w = kernelized_weight(A, B, None, kept(0, device), KernelSpec(sparsify="none"))
    true = float(magnitude_threshold_reference(w, 700))
    started = []
    start = module._warm_start
    monkeypatch.setattr(module, "_warm_start", lambda *a: (started.append(start(*a)), started[-1])[1])
    width = 2.0 ** (WARM_BITS - 1 - 23)  # half of the range, relative to a power of two
    lasts = (true, true * (1 + width / 3), true * (1 - width / 3), true * 1.5, true / 3, 0.0, -1.0, float("nan"), 1e-45)
    for last in (*lasts, float("inf")):
        hint = torch.tensor(last, device=device)
        if source == "given":
            found = magnitude_threshold(w, kept(700, device), hint)
        else:
            found = kernelized_threshold(A, B, None, kept(700, device), spec, hint)
        assert float(found) == true, last
    assert [bool(done) for _, done in started] == [True] * 3 + [False] * 7  # inside of the range, and outside


@pytest.mark.usefixtures("always_warm")
def test_the_layer_remembers_its_threshold(device: str) -> None:
    A, B = torch.randn(2, 45, 3, device=device), torch.randn(2, 150, 3, device=device)
    last = torch.tensor(-1.0, device=device)
    cold = kernelized_weight(A, B, None, kept(700, device), KernelSpec())
    for _ in range(2):
        assert torch.equal(kernelized_weight(A, B, None, kept(700, device), KernelSpec(), last=last), cold)
        assert torch.equal(last, kernelized_threshold(A, B, None, kept(700, device), KernelSpec()))
    kernelized_weight(A, B, None, kept(6750, device), KernelSpec(), last=last)
    assert float(last) == -1
