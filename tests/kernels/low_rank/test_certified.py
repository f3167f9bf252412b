"""Low-rank approximations with an exact error."""

from __future__ import annotations

import pytest
import torch

from peft_zoo.kernels.low_rank import certified
from peft_zoo.kernels.low_rank.certified import certified_svd


def matrix(rows: int, columns: int, decay: float) -> torch.Tensor:
    """A matrix with singular values `k^-decay`."""
    small = min(rows, columns)
    U, V = (torch.linalg.qr(torch.randn(size, small, dtype=torch.float64)).Q for size in (rows, columns))
    return (U * torch.arange(1, small + 1, dtype=torch.float64) ** -decay @ V.mT).float()


@pytest.fixture(params=[512, 20], ids=["exact", "randomized"])
def _dense_up_to(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certified, "DENSE", request.param)


@pytest.mark.usefixtures("_dense_up_to")
@pytest.mark.parametrize("shape", [(120, 70), (70, 120)], ids=str)
@pytest.mark.parametrize("decay", [0.3, 1.5])
def test_the_error_is_that_of_the_factors_and_near_the_optimum(shape: tuple[int, int], decay: float) -> None:
    W = matrix(*shape, decay)
    svd = certified_svd(W, rank=8)
    product = svd.U[:, :8] * svd.S[:8] @ svd.Vh[:8]
    error = ((W - product).norm() / W.double().norm()).item()
    optimum = torch.linalg.svdvals(W.double())
    best = (optimum[8:].norm() / optimum.norm()).item()
    assert svd.error(8) == pytest.approx(error, rel=1e-9)
    assert best * (1 - 1e-9) <= svd.error(8) <= best * 1.001


@pytest.mark.usefixtures("_dense_up_to")
def test_the_rank_of_an_error() -> None:
    W = matrix(120, 70, 0.7)
    values = torch.linalg.svdvals(W.double())
    for error in (0.5, 0.2, 0.05, 0.0):
        svd = certified_svd(W, error=error)
        rank = svd.rank(error)
        assert rank is not None and svd.error(rank) <= error + 1e-7
        best = next(k for k in range(1, 71) if values[k:].norm() <= (error + 1e-7) * values.norm())
        assert best <= rank <= best + 1


@pytest.mark.usefixtures("_dense_up_to")
def test_zeros_low_ranks_and_bad_values() -> None:
    zero = certified_svd(torch.zeros(90, 80), rank=4)
    assert zero.error(1) == 0 and zero.rank(0.1) == 1
    low = certified_svd((torch.randn(90, 3) @ torch.randn(3, 80)), error=1e-5)
    assert low.rank(1e-5) == 3
    for wrong in ({"rank": 0}, {"error": -1.0}, {}, {"rank": 1, "error": 0.1}):
        with pytest.raises(ValueError, match=r"rank|error"):
            certified_svd(torch.randn(30, 30), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not finite"):
        certified_svd(torch.full((30, 30), torch.nan), rank=1)
