"""Combines LoRA adapters into a new one that computes the combination of their updates, or refuses with the reason.

    ΔW = Σ w_i s_i B_i A_i              linear, cat, svd
    ΔW = op(s_1 B_1 A_1, …; w)          ties, dare_linear, dare_ties, magnitude_prune, entry by entry; also with _svd

`cat` keeps the sum of the ranks and is exact. `*_svd` is the best approximation of rank `svd_rank`. The others keep the
rank r of the adapters, and are refused where that rank cannot hold the combination: peft combines the factors instead,
`(Σ √w_i B_i)(Σ √w_i A_i)`, which has a term `B_i A_j` for each pair of adapters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, ties
from torch import Tensor, nn

from peft_zoo.common.checks import is_number
from peft_zoo.kernels.low_rank.factored import truncate_factors

Factors = tuple[Tensor, Tensor]
BY_ENTRY = {"ties": ties, "dare_linear": dare_linear, "dare_ties": dare_ties, "magnitude_prune": magnitude_prune}
SUMS = ("linear", "cat", "svd")
TYPES = (*SUMS, *BY_ENTRY, *(f"{name}_svd" for name in BY_ENTRY))
EXACT = 1e-5
"""Relative error, in the Frobenius norm, up to which an update counts as represented."""


@dataclass(frozen=True)
class Combination:
    """What to combine and how.

    Attributes:
        adapters: Names of the adapters.
        weights: One factor per adapter.
        kind: One of `TYPES`.
        density: Share of the entries that the pruning types keep.
        majority_sign_method: How `ties` and `dare_ties` elect the sign of an entry.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    kind: str
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        if not self.adapters or len(set(self.adapters)) != len(self.adapters):
            raise ValueError(f"adapters={[*self.adapters]!r}: name at least one adapter, and each only once.")
        if len(self.weights) != len(self.adapters) or not all(map(is_number, self.weights)):
            raise ValueError(f"weights={[*self.weights]!r}: give one finite number for each of {[*self.adapters]!r}.")
        if self.kind not in TYPES:
            raise ValueError(f"Invalid combination_type: {self.kind!r}; use one of {', '.join(TYPES)}.")
        if not self.is_sum and not (is_number(self.density) and 0 < self.density <= 1):  # type: ignore[operator]
            raise ValueError(f"density={self.density!r}: {self.kind} needs a share above 0, up to 1.")

    @property
    def is_sum(self) -> bool:
        """Whether the combination is the weighted sum of the updates."""
        return self.kind in SUMS

    def of(self, updates: Sequence[Factors], weights: Sequence[float]) -> Factors:
        """Returns factors of the combination of the updates `B A` of one layer, in float64 and without truncation."""
        if self.is_sum:
            B, A = zip(*((B.double() * w, A.double()) for (B, A), w in zip(updates, weights, strict=True)), strict=True)
            return torch.cat(B, 1), torch.cat(A)
        kind = self.kind.removesuffix("_svd")
        operation: Callable[..., Tensor] = BY_ENTRY[kind]
        if kind.endswith("ties"):
            operation = partial(operation, majority_sign_method=self.majority_sign_method)
        dense = [B.double() @ A.double() for B, A in updates]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The density 1")  # which prunes nothing, as asked
            total = operation(dense, torch.tensor(weights, dtype=torch.float64, device=dense[0].device), self.density)
        U, S, V = torch.linalg.svd(total, full_matrices=False)
        return U * S, V


def check_adapters(model: Any, combination: Combination) -> None:
    """Raises a ValueError that names an adapter and the part of it that cannot be combined."""
    for name in combination.adapters:
        config = model.peft_config.get(name)
        if config is None:
            raise ValueError(f"adapters: {name!r} does not exist; available: {sorted(model.peft_config)}.")
        for field in ("modules_to_save", "trainable_token_indices", "target_parameters"):
            if getattr(config, field, None):
                raise ValueError(
                    f"adapter {name!r} has {field}={getattr(config, field)!r}: what it trains there is no product B A, "
                    "so the new adapter would lack it; combine adapters without it."
                )
        if config.lora_bias and not combination.is_sum:
            raise ValueError(
                f"adapter {name!r} has lora_bias=True: {combination.kind} is defined for weights, and biases are only "
                f"added, Σ w s b; use one of {', '.join(SUMS)}."
            )
    for path, layer in lora_layers(model):
        for name in combination.adapters:
            variant = layer.lora_variant.get(name)
            if variant is not None:
                formula = "m (W + s B A) / |W + s B A| - W" if layer.use_dora.get(name) else "not s B A"
                raise ValueError(
                    f"adapter {name!r} has a {type(variant).__name__} in {path}: its update is {formula}, and a sum of "
                    "such updates is no LoRA; activate the adapters together, or merge them one after the other."
                )
            if name in layer.scaling and getattr(layer.get_base_layer(), "groups", 1) > 1:
                raise ValueError(f"{path}: a LoRA of a grouped convolution is one product B A per group; leave it out.")


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Returns every LoRA layer by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def parameters_of(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Returns the parameters B and A of an adapter."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    B: Any = layer.lora_B[adapter]
    A: Any = layer.lora_A[adapter]
    return B.weight, A.weight


def factors_of(layer: LoraLayer, adapter: str) -> Factors:
    """Returns the scaled B `(out, r)` and A `(r, in)` of an adapter, in float64."""
    B, A = (factor.detach().double().flatten(1) for factor in parameters_of(layer, adapter))
    return B * layer.scaling[adapter], A


def combined(model: Any, combination: Combination, rank: int | None) -> dict[str, Factors]:
    """Returns the factors of the combination by layer name, of rank `rank`; None: of the rank that each layer needs.

    What every adapter of a layer contains beside its update (`ZooLoraModel.contained_factors`), the combination
    contains once.
    """
    found: dict[str, Factors] = {}
    worst = (0.0, "")
    for path, layer in lora_layers(model.model):
        here = [(n, w) for n, w in zip(combination.adapters, combination.weights, strict=True) if n in layer.scaling]
        if not here:
            continue
        weights = [weight for _, weight in here]
        updates = [factors_of(layer, name) for name, _ in here]
        contained = model.contained_factors(path, layer, combination.is_sum and is_whole(weights))
        if contained is not None and not combination.is_sum:
            updates = [_sum(update, contained, -1) for update in updates]
        total = combination.of(updates, weights)
        if contained is not None:
            total = _sum(total, contained, 1 - sum(weights) if combination.is_sum else 1)
        if rank is not None and len(total[1]) > rank:
            low = truncate_factors(*total, min(rank, len(total[0]), total[1].shape[1]))
            total, worst = (low.B, low.A), max(worst, (low.error, path))
        found[path] = total
    _report(combination, rank, *worst)
    return found


def _sum(one: Factors, other: Factors, weight: float) -> Factors:
    """Returns factors of `one + weight * other`."""
    return torch.cat([one[0], weight * other[0].double()], 1), torch.cat([one[1], other[1].double()])


def _report(combination: Combination, rank: int | None, error: float, path: str) -> None:
    """Warns about the largest error of a truncation, or raises a ValueError if the type promises no approximation."""
    if error <= EXACT:
        return
    if combination.kind.endswith("svd"):
        warnings.warn(
            f"combination_type={combination.kind!r}: rank {rank} keeps the combination up to a relative error of "
            f"{error:.1%} in {path}; a higher svd_rank, or 'cat' for a sum, is exact.",
            stacklevel=4,
        )
        return
    raise ValueError(
        f"combination_type={combination.kind!r}: rank r={rank} cannot hold the combination, off by {error:.1%} in "
        f"{path}: rank(Σ w s B A) is up to Σ r, and pruned updates have a full rank. Use 'cat' for the sum, or a type "
        "with '_svd' and svd_rank."
    )


def new_config(first: Any, rank: int, targets: set[str], lora_bias: bool) -> Any:
    """Returns the configuration of the combination: that of the first adapter with a scale of 1."""
    init = first.init_lora_weights
    return replace(
        first,
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        alpha_pattern={},
        rank_pattern={},
        use_rslora=False,
        lora_bias=lora_bias,
        init_lora_weights=True if isinstance(init, str) else init,  # some change the base weights
    )


def write(layer: LoraLayer, name: str, factors: Factors, bias: Tensor | None) -> None:
    """Writes the values of a new adapter."""
    with torch.no_grad():
        B, A = factors
        missing = layer.r[name] - len(A)
        padded = nn.functional.pad(B, (0, missing)), nn.functional.pad(A, (0, 0, 0, missing))
        for parameter, value in zip(parameters_of(layer, name), padded, strict=True):
            parameter.copy_(value.reshape(parameter.shape))
            parameter.requires_grad_(False)
        if layer.lora_bias.get(name):
            own: Any = layer.lora_B[name]
            own.bias.copy_(torch.zeros_like(own.bias) if bias is None else bias)
            own.bias.requires_grad_(False)


def bias_of(layer: LoraLayer, weights: dict[str, float]) -> Tensor | None:
    """Returns the weighted sum of the biases that adapters with `lora_bias` add; None if there are none."""
    modules: dict[str, Any] = {name: layer.lora_B[name] for name in weights if layer.lora_bias.get(name)}
    added = [module.bias.detach().double() * weights[n] * layer.scaling[n] for n, module in modules.items()]
    return torch.stack(added).sum(0) if added else None


def rank_of_type(combination: Combination, configs: Sequence[Any], svd_rank: int | None) -> int | None:
    """Returns the rank of the combination by its type; None for `cat`, which needs the sum in each layer."""
    ranks = [max((config.r, *(config.rank_pattern or {}).values())) for config in configs]
    if combination.kind.endswith("svd"):
        if svd_rank is not None and (type(svd_rank) is not int or svd_rank < 1):
            raise ValueError(f"svd_rank={svd_rank!r}: use an integer of at least 1, or None for the largest r.")
        return svd_rank or max(ranks)
    if combination.kind == "cat":
        return None
    if len(set(ranks)) > 1:
        raise ValueError(
            f"combination_type={combination.kind!r}: all adapters must have the same r, and {[*combination.adapters]} "
            f"have {ranks}; use 'cat' or a type with svd."
        )
    return ranks[0]


def is_whole(weights: Sequence[float]) -> bool:
    """Returns whether weights add up to 1."""
    return math.isclose(sum(weights), 1, abs_tol=1e-9)
