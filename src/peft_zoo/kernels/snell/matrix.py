"""The sparse kernel matrix of SNELL and SNELLA: its definition, in a few lines of differentiable PyTorch.

Two small factors ``A`` (G, in, r/G) and ``B`` (G, out, r/G) are compared point by point by a kernel, which gives a
matrix of full rank; all but its largest entries are then dropped::

    piecewise_linear   W_ij = sum_g c_g ||A_g[i] - B_g[j]||_p                      c_g = scale * (+1, -1, +1, ...)
    mix_k              W_ij = K_ij + alpha softmax_j(K_ij / gamma) + beta          K = piecewise_linear
    linear             W_ij = sum_g c_g A_g[i] . B_g[j]                            (a LoRA; for tests and ablations)
    sigmoid            W_ij = sum_g c_g (alpha / (1 + exp(-beta A_g[i] . B_g[j])) + gamma)
    rbf                W_ij = sum_g c_g (alpha exp(-beta ||A_g[i] - B_g[j]||^2) + gamma)

    S = sparsify(W)    keep |W| > t, with t such that `num_kept` entries remain

Sources: Shen et al., "Expanding Sparse Tuning for Low Memory Usage" (SNELL, arXiv 2411.01800), eq. 3-5 and table A6,
and "SNELLA" (arXiv 2510.24037) with the authors' released code, which `signed_square` and `mix_k` follow.
These functions form (in, out) matrices and save them for backward. `kernelized_linear` computes the same without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peft_zoo.kernels.sparse.threshold import magnitude_threshold_reference

KERNELS = ("piecewise_linear", "mix_k", "linear", "sigmoid", "rbf")
SPARSIFY = ("none", "signed_square", "product", "hard", "soft")

MIN_GAMMA = 1e-4
"""Smallest |gamma| of `mix_k`, whose softmax divides by gamma; see `safe_gamma`."""

FIXED_PARAMS = {"sigmoid": (1.0, -0.5, 1.0), "rbf": (1.0, -1.0, 1.0)}
"""(alpha, gamma, beta) where none are given. The paper has learnable ones without an initial value; these make the
kernel of two zero vectors 0, so that small factors give a small update whatever the number of groups."""


@dataclass(frozen=True)
class KernelSpec:
    """Which kernel matrix: everything about it that is not a tensor.

    Attributes:
        kernel: One of `KERNELS`.
        norm: 1 or 2, the norm of the distances of `piecewise_linear` and `mix_k`; the others have none and want 2.
        scale: Magnitude of the group coefficients c_g (0.1 in the authors' code).
        sparsify: One of `SPARSIFY`: what becomes of the entries that are kept, see `sparsify`.

    Raises:
        ValueError: If a field has a value outside these sets.
    """

    kernel: str = "piecewise_linear"
    norm: int = 2
    scale: float = 0.1
    sparsify: str = "signed_square"

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel={self.kernel!r} is unknown; choose one of {', '.join(KERNELS)}.")
        if self.sparsify not in SPARSIFY:
            raise ValueError(f"sparsify={self.sparsify!r} is unknown; choose one of {', '.join(SPARSIFY)}.")
        if self.norm not in (1, 2):
            raise ValueError(f"norm={self.norm!r} is not supported; use 1 or 2.")
        if self.norm == 1 and not self.is_distance:
            raise ValueError(f"norm=1 has no meaning for kernel={self.kernel!r}; use norm=2.")
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale={self.scale!r} must be positive and finite.")

    @property
    def is_distance(self) -> bool:
        """Whether the matrix is built from norms of differences."""
        return self.kernel in ("piecewise_linear", "mix_k")

    @property
    def uses_differences(self) -> bool:
        """Whether the matrix depends on `A_g[i] - B_g[j]`, not on their product."""
        return self.is_distance or self.kernel == "rbf"

    def sign(self, group: int) -> int:
        """The sign of the coefficient c_g of a group."""
        return -1 if group % 2 else 1


def safe_gamma(gamma: Tensor) -> Tensor:
    """`gamma` with |gamma| >= `MIN_GAMMA` and its sign (zero counts as positive).

    The gradient passes straight through, so that a gamma that has become too small can still leave.
    """
    smallest = torch.full_like(gamma, MIN_GAMMA).copysign(gamma)
    return gamma + torch.where(gamma.abs() < MIN_GAMMA, smallest - gamma, 0.0).detach()


def kernel_params_of(kernel_params: Tensor | None, like: Tensor, spec: KernelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """`(alpha, gamma, beta)` as tensors of shape `()` in the dtype of `like`, the fixed ones where none are given."""
    if kernel_params is None:  # filled on the device: copying them there would wait for it
        alpha, gamma, beta = (like.new_full((), value) for value in FIXED_PARAMS.get(spec.kernel, (0.0, 1.0, 0.0)))
    else:
        alpha, gamma, beta = kernel_params.to(like.dtype).unbind()
    return alpha, gamma, beta


def kernel_matrix(A: Tensor, B: Tensor, kernel_params: Tensor | None, spec: KernelSpec) -> Tensor:
    """The dense kernel matrix W, the definition that every faster path is tested against.

    Args:
        A: Input factors of shape `(G, in, r/G)`.
        B: Output factors of shape `(G, out, r/G)`.
        kernel_params: `[alpha, gamma, beta]` of shape `(3,)`: required by `mix_k`, optional for `sigmoid` and `rbf`.
        spec: The kernel.

    Returns:
        W of shape `(in, out)`, differentiable in all tensors.
    """
    c = torch.tensor([spec.scale * spec.sign(g) for g in range(len(A))], dtype=A.dtype, device=A.device).view(-1, 1, 1)
    alpha, gamma, beta = kernel_params_of(kernel_params, A, spec)
    if spec.kernel == "linear":
        return (c * (A @ B.mT)).sum(0)
    if spec.kernel == "sigmoid":
        return (c * (alpha * torch.sigmoid(beta * (A @ B.mT)) + gamma)).sum(0)
    # Direct differences: the matrix product that cdist prefers loses half the digits of small distances.
    distance = torch.cdist(A, B, p=spec.norm, compute_mode="donot_use_mm_for_euclid_dist")
    if spec.kernel == "rbf":
        return (c * (alpha * torch.exp(-beta * distance.square()) + gamma)).sum(0)
    K = (c * distance).sum(0)
    return K + alpha * torch.softmax(K / safe_gamma(gamma), dim=1) + beta if spec.kernel == "mix_k" else K


def sparsify(W: Tensor, num_kept: Tensor | int, spec: KernelSpec) -> Tensor:
    """Keep the `num_kept` entries of largest magnitude, transformed by `spec.sparsify`; the rest become 0.

    With ``t`` the threshold of `magnitude_threshold` and ``m = 1[|W| > t]``::

        none             S = W (num_kept is ignored)     dS/dW = 1
        signed_square    S = W |W| m                     dS/dW = |W| m            half of the true derivative
        product          S = W max(|W| - t, 0)           dS/dW = max(|W| - t, 0)
        hard             S = W m                         dS/dW = m
        soft             S = sgn(W) max(|W| - t, 0)      dS/dW = m

    `signed_square` is what the authors' code computes, `product` is eq. 5 of their paper. Both take the second factor
    as a constant in the derivative, as that code does; no mode has a gradient through t.

    Args:
        W: The dense matrix, any shape.
        num_kept: How many entries to keep.
        spec: Its field `sparsify` names the mode.

    Returns:
        S, of the shape of `W`.
    """
    if spec.sparsify == "none":
        return W
    return keep_above(W, magnitude_threshold_reference(W.detach(), num_kept), spec)


def keep_above(W: Tensor, threshold: Tensor, spec: KernelSpec) -> Tensor:
    """`sparsify` with the threshold t given, shape `()`; for all modes but `none`."""
    magnitude = W.detach().abs()
    kept = (magnitude > threshold).to(W.dtype)
    level = threshold.clamp_min(0)  # the threshold that keeps all is negative
    if spec.sparsify == "soft":
        return (W - level * W.detach().sign()) * kept
    multiplier = {"signed_square": magnitude, "product": magnitude - level, "hard": torch.ones_like(W)}
    return W * (multiplier[spec.sparsify] * kept)


def reference_weight(
    A: Tensor, B: Tensor, kernel_params: Tensor | None, num_kept: Tensor | int, spec: KernelSpec
) -> Tensor:
    """The sparse kernel matrix S of shape `(in, out)`: `sparsify` of `kernel_matrix`, whose arguments it takes."""
    return sparsify(kernel_matrix(A, B, kernel_params, spec), num_kept, spec)
