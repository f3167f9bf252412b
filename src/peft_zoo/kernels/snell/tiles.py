"""Tiles of SNELL's kernel matrix in torch: each is one block of input features, and one is in memory at a time.

Every pass over the matrix (threshold, forward, backward, merge) computes its tiles with `KernelTiles`, of the same
blocks and by the same instructions. The magnitudes that decide which entries are kept are therefore equal to the last
bit in all passes, and the number of kept entries is exact.

Tiles are stored transposed, `(out, block)`, like the weight of an `nn.Linear`.

Distances come from one matrix product per group, ``|a - b|^2 = [-2a, 1, |a|^2] . [b, |b|^2, 1]``. Subtracting nearly
equal values loses half of the digits, so float32 factors are multiplied in float64: as exact as differences, not
affected by TF32 or bf16 matmul settings, and on a CPU bound by the same memory traffic as a float32 product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_zoo.kernels.base.kernel_spec import KernelSpec

TILE_ELEMENTS = {"cpu": 2**19}
"""Elements of a tile by device type: few enough for a CPU's caches, enough for wide matrix products.
(Of 2^17 to 2^21, 2^19 was fastest at 2048 x 2048 and 768 x 3072 on two cores of a Xeon, torch 2.13, 2026.)"""

_OTHER_DEVICES = 2**21
_BLOCK_MULTIPLE = 64


def tile_elements(device: torch.device) -> int:
    """Returns the largest number of elements of a tile on a device."""
    return TILE_ELEMENTS.get(device.type, _OTHER_DEVICES)


def block_size(in_features: int, out_features: int, device: torch.device) -> int:
    """Returns the number of input features of a tile: at least 1, else as many as `tile_elements` allows."""
    size = max(1, tile_elements(device) // out_features)
    if size >= _BLOCK_MULTIPLE:
        size -= size % _BLOCK_MULTIPLE
    return min(size, in_features)


@dataclass
class Tile:
    """One tile of the kernel matrix, valid until the next one is computed (the memory is reused).

    Attributes:
        block: Input features of the tile.
        pairs: Distance, product, sigmoid or exponential of each group, `(G, out, block)`.
        K: Signed sum of the groups, `(out, block)`.
        P: Softmax of `K / gamma` over the outputs, `(out, block)`, for `mix_k`; else None.
        W: Kernel matrix, `(out, block)`.
    """

    block: slice
    pairs: Tensor
    K: Tensor
    P: Tensor | None
    W: Tensor


class KernelTiles:
    """Computes the kernel matrix of the factors A `(G, in, r/G)` and B `(G, out, r/G)`, one tile at a time."""

    def __init__(self, A: Tensor, B: Tensor, kernel_params: Tensor | None, spec: KernelSpec) -> None:
        self.spec = spec
        self.groups, self.in_features, _ = A.shape
        self.out_features = B.shape[1]
        self.alpha, self.gamma, self.beta = spec.params(kernel_params, A)
        self.offset = spec.coefficient_sum(self.groups)
        self.A, self.B = spec.scaled_factors(A, B)
        self._block = block_size(self.in_features, self.out_features, A.device)
        self._buffers: dict[str, Tensor] = {}
        self._augmented: tuple[Tensor, Tensor] | None = None
        if spec.uses_differences and spec.norm == 2 and A.dtype == torch.float32 and A.device.type != "mps":
            self._augmented = _augment(self.A, self.B)

    def blocks(self) -> Iterator[slice]:
        """Yields the blocks of input features in order; together they cover all features."""
        for start in range(0, self.in_features, self._block):
            yield slice(start, min(start + self._block, self.in_features))

    def buffer(self, name: str, block: slice, groups: int = 1, dtype: torch.dtype | None = None) -> Tensor:
        """Returns uninitialized scratch of shape `(groups, out, block)`; calls with one name share its memory."""
        if name not in self._buffers:
            shape = groups * self.out_features * self._block
            self._buffers[name] = torch.empty(shape, dtype=dtype or self.A.dtype, device=self.A.device)
        width = block.stop - block.start
        return self._buffers[name][: groups * self.out_features * width].view(groups, self.out_features, width)

    def fill(self, W: Tensor) -> Tensor:
        """Writes the whole kernel matrix into `W`, of shape `(out, in)`, and returns it."""
        for block in self.blocks():
            self.tile(block, out=W[:, block])
        return W

    def tile(self, block: slice, out: Tensor | None = None) -> Tile:
        """Computes the tile of a block of input features, with `W` in the memory of `out` if given."""
        pairs = self._pairs(block)
        W = self.buffer("W", block)[0] if out is None else out
        if self.spec.kernel != "mix_k":
            self._combine(pairs, W)
            return Tile(block, pairs, W, None, W)
        K = self._combine(pairs, self.buffer("K", block)[0])
        P = torch.softmax(K / self.gamma, dim=0)
        return Tile(block, pairs, K, P, torch.mul(P, self.alpha, out=W).add_(K).add_(self.beta))

    def _pairs(self, block: slice) -> Tensor:
        """Computes the kernel of every group before the groups are combined, of shape `(G, out, block)`."""
        pairs = self.buffer("pairs", block, self.groups)
        for g in range(self.groups):
            if not self.spec.uses_differences:
                torch.mm(self.B[g], self.A[g, block].t(), out=pairs[g])
            elif self._augmented is None:
                self._differences(g, block, pairs[g])
            else:
                left, right = self._augmented
                pairs[g].copy_(torch.mm(left[g], right[g, :, block], out=self.buffer("wide", block, 1, left.dtype)[0]))
        if self.spec.is_distance:
            return pairs if self.spec.norm == 1 else pairs.clamp_min_(0).sqrt_()
        if self.spec.kernel == "rbf":
            return pairs.clamp_min_(0).mul_(-self.beta).exp_()
        return pairs.mul_(self.beta).sigmoid_() if self.spec.kernel == "sigmoid" else pairs

    def _differences(self, group: int, block: slice, out: Tensor) -> None:
        """Writes `sum_k |a_k - b_k|^p` into `out`, of shape `(out, block)`, one coordinate at a time."""
        out.zero_()
        for k in range(self.A.shape[2]):
            difference = self.difference(group, block, k)
            out.add_(difference.abs_()) if self.spec.norm == 1 else out.addcmul_(difference, difference)

    def difference(self, group: int, block: slice, coordinate: int) -> Tensor:
        """Computes `a - b` in one coordinate of one group, of shape `(out, block)`."""
        a, b = self.A[group, block, coordinate], self.B[group, :, coordinate]
        return torch.sub(a, b[:, None], out=self.buffer("difference", block)[0])

    def _combine(self, pairs: Tensor, out: Tensor) -> Tensor:
        """Writes the signed sum of the groups into `out`, of shape `(out, block)`."""
        if self.groups == 1:
            out.copy_(pairs[0])
        for g in range(1, self.groups):
            torch.add(pairs[0] if g == 1 else out, pairs[g], alpha=self.spec.sign(g), out=out)
        if self.spec.kernel in ("sigmoid", "rbf"):
            out.mul_(self.alpha * self.spec.scale).add_(self.gamma * self.offset)
        return out


def sparsity_multiplier(W: Tensor, threshold: Tensor, spec: KernelSpec, out: Tensor, work: Tensor) -> Tensor:
    """Writes dS/dW of `matrix.sparsify` into `out`; except for `soft` this is also S / W.

    All steps stay in floating point (`work` holds the mask): a bool mask would double their cost on a CPU.
    """
    if spec.sparsify == "none":
        return out.fill_(1)
    torch.abs(W, out=out)
    if spec.sparsify == "product":
        return out.sub_(threshold.clamp_min(0)).clamp_min_(0)
    kept = torch.gt(out, threshold, out=work)
    return out.mul_(kept) if spec.sparsify == "signed_square" else out.copy_(kept)


def apply_sparsity(W: Tensor, multiplier: Tensor, threshold: Tensor, spec: KernelSpec, out: Tensor) -> Tensor:
    """Writes S of `matrix.sparsify` into `out` (which may be `W`), given `sparsity_multiplier` of `W`."""
    if spec.sparsify == "soft":
        level = threshold.clamp_min(0)
        return torch.sub(W, torch.clamp(W, -level, level), out=out)
    return torch.mul(W, multiplier, out=out)


class FactorGradients:
    """Accumulates the gradients of `A`, `B` and the kernel parameters from tiles of the gradient of `W`.

    For a distance, with ``R_g = c_g dK / D_g`` (0 where ``D_g = 0``)::

        dA_g = A_g * rowsum(R_g) - R_g B_g        dB_g = B_g * colsum(R_g) - R_g^T A_g

    The other kernels, which depend on differences or on products of `A` and `B`, have similar sums.
    """

    def __init__(self, tiles: KernelTiles) -> None:
        self.tiles = tiles
        self._A = torch.zeros_like(tiles.A)
        self._B = torch.zeros_like(tiles.B)
        self._params = tiles.A.new_zeros(3)  # alpha, gamma, beta
        # A column of ones makes the matrix products deliver the sums of R as well.
        self._A1 = torch.nn.functional.pad(tiles.A, (0, 1), value=1.0)
        self._B1 = torch.nn.functional.pad(tiles.B, (0, 1), value=1.0)

    def add(self, tile: Tile, dW: Tensor) -> None:
        """Adds one tile, given the gradient of its `W`, of shape `(out, block)`; overwrites `dW`."""
        dK = dW if tile.P is None else self._through_softmax(tile, tile.P, dW)
        if self.tiles.spec.kernel in ("sigmoid", "rbf"):
            self._params[1] += self.tiles.offset * dK.sum()
        for g in range(self.tiles.groups):
            sign = self.tiles.spec.sign(g)
            if self.tiles.spec.norm == 1:
                self._add_norm1(g, tile.block, dK, sign)
            else:
                self._add_group(g, tile.block, self._slope(tile.pairs[g], dK, sign), sign)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of `A`, `B` and `[alpha, gamma, beta]`."""
        tiles = self.tiles
        factors = tiles.A, tiles.B, tiles.alpha, tiles.beta
        return finish_gradients(tiles.spec, *factors, self._A, self._B, self._params)

    def _through_softmax(self, tile: Tile, P: Tensor, dW: Tensor) -> Tensor:
        """Returns the gradient of K, given that of W = K + alpha softmax(K / gamma) + beta."""
        alpha, gamma = self.tiles.alpha, self.tiles.gamma
        weighted = torch.mul(dW, P, out=tile.W)
        rho = weighted.sum(0)
        inner = weighted.sub_(P.mul_(rho))  # P (dW - rho)
        self._params[0] += rho.sum()
        self._params[1] -= alpha / gamma.square() * torch.dot(inner.flatten(), tile.K.flatten())
        self._params[2] += dW.sum()
        return dW.add_(inner.mul_(alpha / gamma))

    def _slope(self, pair: Tensor, dK: Tensor, sign: int) -> Tensor:
        """Computes R of one group without its sign, of shape `(out, block)`, in the memory of `pair`."""
        kernel = self.tiles.spec.kernel
        if kernel == "linear":
            return dK
        if kernel == "rbf":
            R = pair.mul_(dK)
            self._params[0] += sign * R.sum()
            return R
        if kernel == "sigmoid":
            self._params[0] += sign * torch.dot(pair.flatten(), dK.flatten())
            return pair.addcmul_(pair, pair, value=-1).mul_(dK)
        # The gradient of a distance of 0 is defined as 0, as by cdist: dividing by infinity gives it.
        return torch.div(dK, torch.threshold_(pair, 0.0, float("inf")), out=pair)

    def _add_group(self, g: int, block: slice, R: Tensor, sign: int) -> None:
        """Adds the gradients of one group from the derivative R of its kernel in one block of input features."""
        to_A, to_B = R.t() @ self._B1[g], R @ self._A1[g, block]  # (block, r/G + 1), (out, r/G + 1)
        if self.tiles.spec.uses_differences:
            to_A = torch.addcmul(to_A[:, :-1].neg(), self.tiles.A[g, block], to_A[:, -1:])
            to_B = torch.addcmul(to_B[:, :-1].neg(), self.tiles.B[g], to_B[:, -1:])
        rank = self._A.shape[2]
        self._A[g, block].add_(to_A[:, :rank], alpha=sign)
        self._B[g].add_(to_B[:, :rank], alpha=sign)

    def _add_norm1(self, g: int, block: slice, dK: Tensor, sign: int) -> None:
        for k in range(self._A.shape[2]):
            slope = self.tiles.difference(g, block, k).sign_().mul_(dK)
            self._A[g, block, k].add_(slope.sum(0), alpha=sign)
            self._B[g, :, k].sub_(slope.sum(1), alpha=sign)


def finish_gradients(
    spec: KernelSpec, A: Tensor, B: Tensor, alpha: Tensor, beta: Tensor, raw_A: Tensor, raw_B: Tensor, params: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Applies the outer factors to the sums over the matrix that give the gradients of factors and kernel parameters.

    A and B are those of `KernelSpec.scaled_factors`; `raw_A` and `raw_B` are `sum_j R_ij dpair/dA` and
    `sum_i R_ij dpair/dB`. `params` has the sums for `[alpha, gamma, beta]`; `sigmoid` and `rbf` replace that of beta.
    Returns the gradients of unscaled A and B and of `[alpha, gamma, beta]`.
    """
    if spec.is_distance:
        return raw_A * spec.scale, raw_B * spec.scale, params
    if spec.kernel == "linear":
        return raw_A * spec.scale, raw_B, params
    # sigmoid and rbf are functions of beta (a . b) and -beta |a - b|^2.
    along, slope = (A * raw_A).sum(), beta
    if spec.kernel == "rbf":
        along, slope = -along - (B * raw_B).sum(), -2 * beta
    outer = alpha * spec.scale
    return (
        raw_A * (outer * slope),
        raw_B * (outer * slope),
        torch.stack([params[0] * spec.scale, params[1], outer * along]),
    )


def _augment(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns factors of |a - b|^2 in float64: `[b, |b|^2, 1]` (G, out, r/G + 2), `[-2a, 1, |a|^2]` (G, r/G + 2, in).

    The squared norms are shrunk by the rounding error of the product, so that it is exactly 0 after clamping where
    a = b. That error is 1e-15 |a|^2, far below the resolution of float32 coordinates.
    """
    a, b = A.double(), B.double()
    shrink = 1 - a.shape[2] * 4 * torch.finfo(torch.float64).eps
    a2, b2 = (v.square().sum(2, keepdim=True) * shrink for v in (a, b))
    left = torch.cat([b, b2, torch.ones_like(b2)], dim=2)
    return left, torch.cat([-2 * a, torch.ones_like(a2), a2], dim=2).mT.contiguous()
