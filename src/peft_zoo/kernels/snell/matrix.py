"""Definition of the sparse kernel matrix of SNELL and SNELLA, in a few lines of differentiable PyTorch.

A kernel compares the rows of two small factors ``A`` (G, in, r/G) and ``B`` (G, out, r/G) pairwise, which gives a
matrix of full rank; all but its largest entries are then dropped::

    piecewise_linear   W_ij = sum_g c_g ||A_g[i] - B_g[j]||_p                      c_g = scale * (+1, -1, +1, ...)
    mix_k              W_ij = K_ij + alpha softmax_j(K_ij / gamma) + beta          K = piecewise_linear
    linear             W_ij = sum_g c_g A_g[i] . B_g[j]                            (a LoRA; for tests and ablations)
    sigmoid            W_ij = sum_g c_g (alpha / (1 + exp(-beta A_g[i] . B_g[j])) + gamma)
    rbf                W_ij = sum_g c_g (alpha exp(-beta ||A_g[i] - B_g[j]||^2) + gamma)

    S = sparsify(W)    keep |W| > t, with t such that `num_kept` entries remain

Sources: Shen et al., "Expanding Sparse Tuning for Low Memory Usage" (SNELL, arXiv 2411.01800), eq. 3-5 and table A6,
and "SNELLA" (arXiv 2510.24037) with the authors' released code, which `signed_square` and `mix_k` follow.
These functions form (in, out) matrices and save them for backward; `kernelized_linear` does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_zoo.kernels.base.kernel_spec import KernelSpec
from peft_zoo.kernels.sparse.threshold import magnitude_threshold_reference


def kernel_matrix(A: Tensor, B: Tensor, kernel_params: Tensor | None, spec: KernelSpec) -> Tensor:
    """Dense kernel matrix W, the definition that every faster path is tested against.

    Args:
        A: Input factors of shape `(G, in, r/G)`.
        B: Output factors of shape `(G, out, r/G)`.
        kernel_params: `[alpha, gamma, beta]` of shape `(3,)`: required by `mix_k`, optional for `sigmoid` and `rbf`.
        spec: Kernel, norm and scale.

    Returns:
        W of shape `(in, out)`, differentiable in all tensors.
    """
    c = torch.tensor([spec.scale * spec.sign(g) for g in range(len(A))], dtype=A.dtype, device=A.device).view(-1, 1, 1)
    alpha, gamma, beta = spec.params(kernel_params, A)
    if spec.kernel == "linear":
        return (c * (A @ B.mT)).sum(0)
    if spec.kernel == "sigmoid":
        return (c * (alpha * torch.sigmoid(beta * (A @ B.mT)) + gamma)).sum(0)
    # Direct differences: the matrix product that cdist prefers loses half the digits of small distances.
    distance = torch.cdist(A, B, p=spec.norm, compute_mode="donot_use_mm_for_euclid_dist")
    if spec.kernel == "rbf":
        return (c * (alpha * torch.exp(-beta * distance.square()) + gamma)).sum(0)
    K = (c * distance).sum(0)
    return K + alpha * torch.softmax(K / gamma, dim=1) + beta if spec.kernel == "mix_k" else K


def sparsify(W: Tensor, num_kept: Tensor | int, spec: KernelSpec) -> Tensor:
    """Keeps the `num_kept` entries of largest magnitude, transformed by `spec.sparsify`; the rest become 0.

    With ``t`` the threshold of `magnitude_threshold` and ``m = 1[|W| > t]``::

        none             S = W (num_kept is ignored)     dS/dW = 1
        signed_square    S = W |W| m                     dS/dW = |W| m            half of the true derivative
        product          S = W max(|W| - t, 0)           dS/dW = max(|W| - t, 0)
        hard             S = W m                         dS/dW = m
        soft             S = sgn(W) max(|W| - t, 0)      dS/dW = m

    `signed_square` is what the authors' code computes, `product` is eq. 5 of their paper. Both treat the second factor
    as a constant in the derivative, as that code does; no mode has a gradient through t.

    Args:
        W: Dense matrix of any shape.
        num_kept: Number of entries to keep.
        spec: Kernel specification; its field `sparsify` selects the mode.

    Returns:
        S, of the shape of `W`.
    """
    if spec.sparsify == "none":
        return W
    return keep_above(W, magnitude_threshold_reference(W.detach(), num_kept), spec)


def keep_above(W: Tensor, threshold: Tensor, spec: KernelSpec) -> Tensor:
    """`sparsify` with the threshold t given, of shape `()`."""
    if spec.sparsify == "none":
        return W
    magnitude = W.detach().abs()
    kept = (magnitude > threshold).to(W.dtype)
    level = threshold.clamp_min(0)  # the threshold that keeps all is negative
    if spec.sparsify == "soft":
        return (W - level * W.detach().sign()) * kept
    multiplier = {"signed_square": magnitude, "product": magnitude - level, "hard": torch.ones_like(W)}
    return W * (multiplier[spec.sparsify] * kept)


def reference_weight(
    A: Tensor,
    B: Tensor,
    kernel_params: Tensor | None,
    num_kept: Tensor | int,
    spec: KernelSpec,
    threshold: Tensor | None = None,
) -> Tensor:
    """Sparse kernel matrix S of shape `(in, out)`: `sparsify` of `kernel_matrix`; arguments as there.

    A `threshold` of shape `()` replaces the one that follows from `num_kept`.
    """
    W = kernel_matrix(A, B, kernel_params, spec)
    return sparsify(W, num_kept, spec) if threshold is None else keep_above(W, threshold, spec)
