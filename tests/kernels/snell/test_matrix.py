"""Definitions of SNELL's kernel matrix against values worked out by hand and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peft_zoo.kernels.base.kernel_spec import KERNELS, MIN_GAMMA, KernelSpec, safe_gamma
from peft_zoo.kernels.snell.matrix import kernel_matrix, reference_weight, sparsify


def by_hand(A: Tensor, B: Tensor, params: list[float], spec: KernelSpec) -> Tensor:
    """The formulas in the head of `matrix.py`, one entry at a time."""
    alpha, gamma, beta = params
    groups, rows, columns = len(A), A.shape[1], B.shape[1]
    W = [[0.0] * columns for _ in range(rows)]
    for i in range(rows):
        for j in range(columns):
            for g in range(groups):
                a, b = A[g, i].tolist(), B[g, j].tolist()
                dot = sum(p * q for p, q in zip(a, b, strict=True))
                square = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
                value = {
                    "linear": dot,
                    "sigmoid": alpha / (1 + math.exp(-beta * dot)) + gamma,
                    "rbf": alpha * math.exp(-beta * square) + gamma,
                }.get(spec.kernel, math.sqrt(square))
                if spec.norm == 1:
                    value = sum(abs(p - q) for p, q in zip(a, b, strict=True))
                W[i][j] += spec.scale * (-1) ** g * value
    if spec.kernel == "mix_k":
        for row in W:
            total = sum(math.exp(k / gamma) for k in row)
            row[:] = [k + alpha * math.exp(k / gamma) / total + beta for k in row]
    return torch.tensor(W, dtype=A.dtype)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(
    "spec", [*(KernelSpec(k) for k in KERNELS), KernelSpec(norm=1), KernelSpec("mix_k", 1, 0.3)], ids=str
)
def test_kernel_matrix(spec: KernelSpec, groups: int) -> None:
    A, B = torch.randn(groups, 4, 3, dtype=torch.float64), torch.randn(groups, 5, 3, dtype=torch.float64)
    params = [0.7, 0.4, 0.3]
    found = kernel_matrix(A, B, torch.tensor(params, dtype=torch.float64), spec)
    torch.testing.assert_close(found, by_hand(A, B, params, spec), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", ["sigmoid", "rbf"])
def test_without_parameters_zero_factors_give_a_zero_matrix(kernel: str) -> None:
    zeros = torch.zeros(1, 3, 2)
    assert torch.equal(kernel_matrix(zeros, zeros, None, KernelSpec(kernel)), torch.zeros(3, 3))


def test_modes_of_sparsify() -> None:
    W = torch.tensor([[0.5, -2.0], [1.0, -3.0]])
    expected = {
        "none": [[0.5, -2.0], [1.0, -3.0]],
        "signed_square": [[0.0, -4.0], [0.0, -9.0]],
        "product": [[0.0, -2.0], [0.0, -6.0]],
        "hard": [[0.0, -2.0], [0.0, -3.0]],
        "soft": [[0.0, -1.0], [0.0, -2.0]],
    }
    slopes = {
        "none": [[1.0, 1.0], [1.0, 1.0]],
        "signed_square": [[0.0, 2.0], [0.0, 3.0]],
        "product": [[0.0, 1.0], [0.0, 2.0]],
        "hard": [[0.0, 1.0], [0.0, 1.0]],
        "soft": [[0.0, 1.0], [0.0, 1.0]],
    }
    for mode in expected:
        leaf = W.clone().requires_grad_()
        S = sparsify(leaf, 2, KernelSpec(sparsify=mode))
        assert S.tolist() == expected[mode], mode
        S.sum().backward()
        assert leaf.grad is not None and leaf.grad.tolist() == slopes[mode], mode


@pytest.mark.parametrize("mode", ["signed_square", "product", "hard", "soft"])
def test_all_none_and_ties(mode: str) -> None:
    spec = KernelSpec(sparsify=mode)
    W = torch.tensor([2.0, -2.0, 1.0, 5.0])
    assert int((sparsify(W, 4, spec) != 0).sum()) == 4
    assert int((sparsify(W, 0, spec) != 0).sum()) == 0
    assert int((sparsify(W, 2, spec) != 0).sum()) == 1  # the two 2.0 tie at the threshold: neither is kept
    assert int((sparsify(W, 3, spec) != 0).sum()) == 3


def test_safe_gamma_keeps_its_distance_sign_and_gradient() -> None:
    gamma = torch.tensor([0.0, -0.0, 1e-9, -1e-9, 0.5, -2.0], requires_grad=True)
    safe = safe_gamma(gamma)
    assert safe.tolist() == pytest.approx([MIN_GAMMA, -MIN_GAMMA, MIN_GAMMA, -MIN_GAMMA, 0.5, -2.0])
    assert torch.equal(safe[4:], gamma[4:])
    safe.sum().backward()
    assert gamma.grad is not None and gamma.grad.tolist() == [1.0] * 6


def test_reference_weight_is_finite_at_gamma_zero() -> None:
    A, B = torch.randn(2, 6, 2), torch.randn(2, 7, 2)
    params = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    S = reference_weight(A, B, params, 20, KernelSpec("mix_k"))
    S.sum().backward()
    assert S.isfinite().all() and params.grad is not None and params.grad.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel": "cosine"}, "kernel='cosine'.*piecewise_linear"),
        ({"sparsify": "topk"}, "sparsify='topk'"),
        ({"norm": 3}, "norm=3"),
        ({"kernel": "rbf", "norm": 1}, "norm=1.*kernel='rbf'"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"scale": float("nan")}, "scale=nan"),
    ],
)
def test_bad_spec(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KernelSpec(**fields)  # type: ignore[arg-type]
