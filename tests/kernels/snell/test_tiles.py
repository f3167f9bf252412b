"""Tiles of the kernel matrix: same bits in every pass, exact for small distances and any precision of matmul."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from peft_zoo.kernels.base.kernel_spec import KERNELS, KernelSpec
from peft_zoo.kernels.snell.matrix import kernel_matrix
from peft_zoo.kernels.snell.tiles import TILE_ELEMENTS, FactorGradients, KernelTiles, block_size

CPU = torch.device("cpu")
SPECS = [*(KernelSpec(kernel) for kernel in KERNELS), KernelSpec(norm=1), KernelSpec("mix_k", norm=1)]


def params_of(spec: KernelSpec) -> torch.Tensor | None:
    return None if spec.kernel in ("piecewise_linear", "linear") else torch.tensor([0.8, 0.7, 0.3])


def test_blocks_cover_all_features_and_respect_the_limit() -> None:
    for shape in [(1, 1), (63, 1000), (2048, 2048), (768, 3072), (3072, 768), (4096, 2**20)]:
        A, B = torch.empty(1, shape[0], 1), torch.empty(1, shape[1], 1)
        blocks = list(KernelTiles(A, B, None, KernelSpec()).blocks())
        assert [b.start for b in blocks] == [0, *(b.stop for b in blocks[:-1])] and blocks[-1].stop == shape[0]
        width = block_size(*shape, CPU)
        assert width * shape[1] <= TILE_ELEMENTS["cpu"] or width == 1
    assert block_size(10, 10, torch.device("meta")) == 10


@pytest.mark.parametrize("tile", [1, 100, 700, 10**6])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_pass_sees_the_same_bits(spec: KernelSpec, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", tile)
    A, B = torch.randn(2, 37, 3), torch.randn(2, 53, 3)
    tiles = KernelTiles(A, B, params_of(spec), spec)
    W = tiles.fill(torch.empty(53, 37))
    for block in tiles.blocks():
        assert torch.equal(tiles.tile(block).W, W[:, block])
    again = KernelTiles(A, B, params_of(spec), spec)
    for block in reversed(list(again.blocks())):
        assert torch.equal(again.tile(block).W, W[:, block])


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 16])
def test_float32_is_as_exact_as_its_inputs(spec: KernelSpec, rank: int) -> None:
    """Includes close points, for which a float32 matrix product would lose half of the digits."""
    A = torch.randn(2, 40, rank)
    B = torch.cat([A[:, :30] * (1 + 1e-5), torch.randn(2, 20, rank)], dim=1)
    params = params_of(spec)
    exact = kernel_matrix(A.double(), B.double(), None if params is None else params.double(), spec)
    found = KernelTiles(A, B, params, spec).fill(torch.empty(50, 40)).t()
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-7 * float(exact.abs().max()))


@pytest.fixture
def low_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("low_precision")
def test_distances_ignore_the_precision_of_matmul() -> None:
    A, B = torch.randn(2, 256, 16), torch.randn(2, 256, 16)
    found = KernelTiles(A, B, None, KernelSpec()).fill(torch.empty(256, 256)).t()
    torch.testing.assert_close(found, kernel_matrix(A, B, None, KernelSpec()), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("rank", [1, 4, 32])
def test_coincident_points_have_distance_zero_and_no_gradient(rank: int, norm: int, dtype: torch.dtype) -> None:
    A = torch.randn(1, 50, rank, dtype=dtype) * 100
    tiles = KernelTiles(A, A.clone(), None, KernelSpec(norm=norm))
    tile = tiles.tile(slice(0, 50))
    assert torch.equal(tile.W.diag(), torch.zeros(50, dtype=dtype))
    gradients = FactorGradients(tiles)
    gradients.add(tile, torch.eye(50, dtype=dtype))
    dA, dB, _ = gradients.result()
    assert not dA.any() and not dB.any()


def test_equal_groups_cancel_exactly() -> None:
    A, B = torch.randn(1, 33, 4).repeat(2, 1, 1), torch.randn(1, 21, 4).repeat(2, 1, 1)
    assert not KernelTiles(A, B, None, KernelSpec()).fill(torch.empty(21, 33)).any()
