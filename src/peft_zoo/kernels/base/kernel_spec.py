"""Specification of SNELL's kernel matrix: its kernel, its sparsity mode, and what follows from both for the factors.

It lies in `base` because the threshold kernels of `sparse` and the weight kernels of `snell` both compute this matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peft_zoo.common.checks import check_choice

KERNELS = ("piecewise_linear", "mix_k", "linear", "sigmoid", "rbf")
SPARSIFY = ("none", "signed_square", "product", "hard", "soft")

MIN_GAMMA = 1e-4
"""Smallest |gamma| of `mix_k`, whose softmax divides by gamma; see `safe_gamma`."""

FIXED_PARAMS = {"sigmoid": (1.0, -0.5, 1.0), "rbf": (1.0, -1.0, 1.0)}
"""`(alpha, gamma, beta)` of a kernel without learnable parameters. The paper gives no initial values; with these the
kernel of two zero vectors is 0, so small factors give a small update for any number of groups."""


@dataclass(frozen=True)
class KernelSpec:
    """Kernel and sparsity mode of a SNELL update, as the functions `kernelized_*` take them.

    Attributes:
        kernel: One of `KERNELS`: `"piecewise_linear"` (default), `"mix_k"`, `"linear"`, `"sigmoid"`, `"rbf"`.
        norm: Norm of the distances in `piecewise_linear` and `mix_k`, 1 or 2 (default); 2 for all other kernels.
        scale: Magnitude of the group coefficients c_g, positive; 0.1 (default) as in the authors' code.
        sparsify: One of `SPARSIFY`: transformation of the kept entries, see `peft_zoo.kernels.snell.matrix.sparsify`;
            `"signed_square"` (default) as in the authors' code.

    Raises:
        ValueError: If a field has any other value.

    Examples:
        >>> from peft_zoo.kernels import KernelSpec
        >>> KernelSpec("mix_k", sparsify="hard")
        KernelSpec(kernel='mix_k', norm=2, scale=0.1, sparsify='hard')
    """

    kernel: str = "piecewise_linear"
    norm: int = 2
    scale: float = 0.1
    sparsify: str = "signed_square"

    def __post_init__(self) -> None:
        check_choice("kernel", self.kernel, KERNELS)
        check_choice("sparsify", self.sparsify, SPARSIFY)
        if self.norm not in (1, 2):
            raise ValueError(f"norm={self.norm!r} is not supported; use 1 or 2.")
        if self.norm == 1 and not self.is_distance:
            raise ValueError(f"norm=1 has no meaning for kernel={self.kernel!r}; use norm=2.")
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale={self.scale!r} must be positive and finite.")

    @property
    def fields(self) -> tuple[str, int, float, str]:
        """Values of the four fields, as arguments of an operator."""
        return self.kernel, self.norm, self.scale, self.sparsify

    @property
    def is_distance(self) -> bool:
        """Whether the matrix is a sum of norms of differences."""
        return self.kernel in ("piecewise_linear", "mix_k")

    @property
    def uses_differences(self) -> bool:
        """Whether the matrix depends on `A_g[i] - B_g[j]`, not on their product."""
        return self.is_distance or self.kernel == "rbf"

    def sign(self, group: int) -> int:
        """Sign of the coefficient c_g of a group."""
        return -1 if group % 2 else 1

    def coefficient_sum(self, groups: int) -> float:
        """Sum of the coefficients c_g of so many groups."""
        return self.scale * sum(self.sign(g) for g in range(groups))

    def scaled_factors(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Multiplies the scale into the factors where the kernel allows it, which saves a pass over the matrix.

        `c ||a - b|| = ||ca - cb||` for distances and `c (a . b) = ca . b` for `linear`; other kernels get A and B.
        """
        scaled_A = A * self.scale if self.is_distance or self.kernel == "linear" else A
        return scaled_A, B * self.scale if self.is_distance else B

    def params(self, kernel_params: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `alpha`, `gamma` and `beta`, each of shape `()` in the dtype of `like`.

        They come from `kernel_params`, `[alpha, gamma, beta]` of shape `(3,)`, or from `FIXED_PARAMS` if it is None.
        """
        if kernel_params is None:  # filled on the device: copying them there would wait for it
            alpha, gamma, beta = (like.new_full((), value) for value in FIXED_PARAMS.get(self.kernel, (0.0, 1.0, 0.0)))
        else:
            alpha, gamma, beta = kernel_params.to(like.dtype).unbind()
        return alpha, safe_gamma(gamma) if self.kernel == "mix_k" else gamma, beta


def safe_gamma(gamma: Tensor) -> Tensor:
    """Returns `gamma` with |gamma| of at least `MIN_GAMMA` and its sign; zero counts as positive.

    The gradient passes unchanged, so that training can move a gamma that is too small away from zero.
    """
    smallest = torch.full_like(gamma, MIN_GAMMA).copysign(gamma)
    return gamma + torch.where(gamma.abs() < MIN_GAMMA, smallest - gamma, 0.0).detach()
