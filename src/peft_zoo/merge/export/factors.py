"""Exact factors of the adapter layers of peft whose update is a product of two matrices.

Each function reads the parameters of one adapter in a layer and returns B `(out, R)` and A `(R, in)` in float64 with
``Delta W = B A``, all scales included::

    AdaLoRA    B = P s / (R + 1e-5)                  A = E * Q                      E (R, 1), Zhang et al., eq. 3
    DeLoRA     B = B lambda / (R |B_i| |A_i|)        A = A * |W|                    norms of columns, rows and inputs
    VeRA       B = b * B[:out]                       A = d * A[:, :in]              shared random matrices
    PVeRA      as VeRA with the means of the distributions, the first half of A and d
    MiSS       B = M^T (out, R)                      A[j, i] = 1 if i mod R = j
    VB-LoRA    rows of A and columns of B are mixtures of the top k vectors of a bank
    UniLoRA    A = theta[i_A] s_A                    B = theta[i_B] s_B
    LoHa       B = [b1_i * b2_j]                     A = [a1_i * a2_j]              R = r^2 (row-wise Khatri-Rao)
    LoKr       B = B1 (x) B2                         A = A1 (x) A2                  R = rank(W1) rank(W2)
    GraLoRA    B = diag(B_1, ..., B_k)               A = [A_1; ...; A_k]            R = k r, and the hybrid's own

Kernels of convolutions are flattened: columns are input channels times kernel. LoHa and LoKr have no factors here if
their rank is above 256 and above a quarter of both sizes, where forming the matrix is cheaper; nor has a LoKr with a
whole W2 for a one-dimensional convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

MOST = 256  # rank up to which a product of ranks is always formed
Factors = tuple[Tensor, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


def _adalora(layer: Any, name: str) -> Factors:
    scale = layer.scaling[name] / (layer.ranknum[name].double() + 1e-5)
    return layer.lora_B[name].double() * scale, layer.lora_A[name].double() * layer.lora_E[name].double()


def _delora(layer: Any, name: str) -> Factors:
    A, B = layer.delora_A[name].double(), layer.delora_B[name].double()
    norms = A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4)
    return B * (layer.delora_lambda[name].double() / (layer.r[name] * norms)), A * layer.delora_w_norm[name].double()


def _vera(layer: Any, name: str) -> Factors:
    b, d = layer.vera_lambda_b[name].double(), layer.vera_lambda_d[name].double()
    A, B = layer.vera_A[name].double()[:, : layer.in_features], layer.vera_B[name].double()[: layer.out_features]
    return b[:, None] * B, d[:, None] * A


def _pvera(layer: Any, name: str) -> Factors:
    b, d = layer.pvera_lambda_b[name].double(), layer.pvera_lambda_d[name].double()
    A, B = layer.pvera_A[name].double()[:, : layer.in_features], layer.pvera_B[name].double()[: layer.out_features]
    return b[:, None] * B, d[: len(d) // 2, None] * A[: len(A) // 2]


def _miss(layer: Any, name: str) -> Factors:
    block = layer.miss_block[name].double()
    columns = torch.arange(layer.in_features, device=block.device)
    A = torch.zeros(len(block), layer.in_features, dtype=torch.float64, device=block.device)
    A[columns % len(block), columns] = 1.0
    return block.repeat(1, layer.out_features // block.shape[1]).mT, A


def _vblora(layer: Any, name: str) -> Factors:
    bank = layer.vblora_vector_bank[name].double()

    def mixtures(logits: Tensor) -> Tensor:
        largest, indices = logits.double().topk(layer.topk[name], dim=-1)
        return (largest.softmax(-1)[..., None] * bank[indices]).sum(-2)

    A, B = mixtures(layer.vblora_logits_A[name]), mixtures(layer.vblora_logits_B[name])
    return B.mT.flatten(0, 1), A.flatten(1)


def _unilora(layer: Any, name: str) -> Factors:
    theta = layer.unilora_theta_d[name].double()
    A = theta[layer.unilora_indices_A[name]] * layer.unilora_scales_A[name].double()
    return theta[layer.unilora_indices_B[name]] * layer.unilora_scales_B[name].double(), A


def _loha(layer: Any, name: str) -> Factors | None:
    pairs = []
    for part in ("1", "2"):
        up, down = (getattr(layer, f"hada_w{part}_{side}")[name].double() for side in "ab")
        cores = getattr(layer, f"hada_t{part}")
        if name in cores:  # a convolution in Tucker form: both factors stand the other way round
            core = torch.einsum("ij...,jr->ir...", cores[name].double(), down)
            up, down = up.mT, core.flatten(1)
        pairs.append((up, down))
    (B1, A1), (B2, A2) = pairs
    if _is_too_large(len(A1) * len(A2), len(B1), A1.shape[1]):
        return None
    B = (B1[:, :, None] * B2[:, None, :]).flatten(1)
    return B * layer.scaling[name], (A1[:, None] * A2[None]).flatten(0, 1)


def _lokr(layer: Any, name: str) -> Factors | None:
    if name in layer.lokr_w1:
        first = _split(layer.lokr_w1[name])
    else:
        first = layer.lokr_w1_a[name].double(), layer.lokr_w1_b[name].double()
    if name in layer.lokr_w2 and layer.lokr_w2[name].ndim == 3:
        return None  # peft's Kronecker product of a matrix and a kernel of one dimension is none of matrices
    if name in layer.lokr_w2:
        second = _split(layer.lokr_w2[name].flatten(1))
    elif name in layer.lokr_t2:
        core = torch.einsum("ij...,jr->ir...", layer.lokr_t2[name].double(), layer.lokr_w2_b[name].double())
        second = layer.lokr_w2_a[name].double().mT, core.flatten(1)
    else:
        second = layer.lokr_w2_a[name].double(), layer.lokr_w2_b[name].double()
    (B1, A1), (B2, A2) = first, second
    if _is_too_large(len(A1) * len(A2), len(B1) * len(B2), A1.shape[1] * A2.shape[1]):
        return None
    B, A = (torch.kron(one.contiguous(), two.contiguous()) for one, two in zip(first, second, strict=True))
    return B * layer.scaling[name], A


def _is_too_large(rank: int, rows: int, columns: int) -> bool:
    """Whether a matrix is better formed than kept as factors of a rank."""
    return rank > max(MOST, min(rows, columns) // 4)


def _split(matrix: Tensor) -> Factors:
    """Splits a small matrix into factors of its rank."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    rank = max(1, int((S[0] * 1e-14 * max(matrix.shape) < S).sum()))
    return U[:, :rank] * S[:rank], Vh[:rank]


def _gralora(layer: Any, name: str) -> Factors:
    A, B, k = layer.gralora_A[name].double(), layer.gralora_B[name].double(), layer.gralora_k[name]
    rank = A.shape[-1]  # A (k, in/k, r), B (k, r, out/k)
    # Rank block i of input block j goes to output block i: as peft permutes the activations.
    parts = A.reshape(k, -1, k, rank // k)
    rows = A.new_zeros(k, k, rank // k, A.shape[1] * k)  # (output block, input block, rank, in)
    for source in range(k):
        columns = slice(source * A.shape[1], (source + 1) * A.shape[1])
        rows[:, source, :, columns] = parts[source].permute(1, 2, 0)
    new_A, new_B = rows.flatten(0, 2), torch.block_diag(*(block.mT for block in B))
    if layer.hybrid_r[name] > 0:
        new_A = torch.cat([new_A, layer.gralora_A_general[name].weight.double()])
        new_B = torch.cat([new_B, layer.gralora_B_general[name].weight.double()], 1)
    return new_B * layer.scaling[name], new_A


LAYER_FACTORS: dict[str, Callable[[Any, str], Factors | None]] = {
    "ADALORA": _adalora,
    "DELORA": _delora,
    "GRALORA": _gralora,
    "LOHA": _loha,
    "LOKR": _lokr,
    "MISS": _miss,
    "PVERA": _pvera,
    "UNILORA": _unilora,
    "VBLORA": _vblora,
    "VERA": _vera,
}
"""Functions from a layer and the name of an adapter to its exact factors, None if it has no useful ones, by type."""


def _lora_sizes(shapes: Shapes, prefix: str) -> tuple[int, int]:
    return shapes[f"{prefix}_B"][0], shapes[f"{prefix}_A"][1]


def _vblora_sizes(shapes: Shapes, length: int) -> tuple[int, int]:
    A = shapes.get("vblora_logits_A") or shapes["vblora_logits_A_topk_indices"]
    B = shapes.get("vblora_logits_B") or shapes["vblora_logits_B_topk_indices"]
    return B[0] * length, A[1] * length


def _lokr_sizes(shapes: Shapes) -> tuple[int, int]:
    sizes = []
    for part in ("lokr_w1", "lokr_w2"):
        whole = shapes.get(part) or (shapes[f"{part}_a"][0], shapes[f"{part}_b"][1])
        if len(whole) != 2 or "lokr_t2" in shapes:
            raise KeyError(part)
        sizes.append(whole)
    return sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1]


def _loha_sizes(shapes: Shapes) -> tuple[int, int]:
    if "hada_t1" in shapes:
        raise KeyError("hada_t1")
    return shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]


def _gralora_sizes(shapes: Shapes) -> tuple[int, int]:
    A, B = shapes["gralora_A"], shapes["gralora_B"]
    return B[0] * B[2], A[0] * A[1]


FILE_SIZES: dict[str, Callable[[Shapes, Any], tuple[int, int]]] = {
    "ADALORA": lambda shapes, config: _lora_sizes(shapes, "lora"),
    "C3A": lambda shapes, config: (math.prod(shapes["c3a_kernel"][::2]), math.prod(shapes["c3a_kernel"][1:])),
    "DELORA": lambda shapes, config: _lora_sizes(shapes, "delora"),
    "GRALORA": lambda shapes, config: _gralora_sizes(shapes),
    "LOHA": lambda shapes, config: _loha_sizes(shapes),
    "LOKR": lambda shapes, config: _lokr_sizes(shapes),
    "UNILORA": lambda shapes, config: (shapes["unilora_indices_B"][0], shapes["unilora_indices_A"][1]),
    "VBLORA": lambda shapes, config: _vblora_sizes(shapes, config.vector_length),
}
"""Functions from the shapes of a module's tensors, and the configuration, to `(out, in)`; a KeyError if they lack it.

The files of the other types do not hold the sizes of the layers, so these need the configuration of the base model.
"""
