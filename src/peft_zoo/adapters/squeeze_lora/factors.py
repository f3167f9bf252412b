"""Reads the LoRA factors of a model as matrices, and lowers their rank together with the optimizer's state.

New factors are products with small matrices (`peft_zoo.kernels.low_rank.factored`): ``B' = B P_B``, ``A' = P_A A``.
Adam's first moments follow exactly, since ``dL/dB' = f dL/dB P_A^T`` and ``dL/dA' = f P_B^T dL/dA`` with the ratio of
scales ``f = s'/s``. Its second moments have no exact image. The squared matrices overestimate them where the mean of
the gradients dominates their variance, so each direction is rescaled to the ratio of squared first to second moments
that the tensor had before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from peft_zoo.common.modules import plain_modules
from peft_zoo.io.lora_ranks import alpha_of, kept_scale
from peft_zoo.kernels.low_rank.factored import truncate_factors

PLAIN_VARIANTS = (
    "DoraLinearVariant",
    "DoraEmbeddingVariant",
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraConv3dVariant",
)
"""Variants of peft's LoRA layers with the update `scale * B A` before their own modification."""


@dataclass(frozen=True)
class LoraPair:
    """Factors of one adapter in one module of the base model: parameters B `(out, R, ...)` and A `(R, in, ...)`.

    The update `scale * B A` is `(out, in)`; kernels are flattened, and that of an embedding is transposed.
    """

    name: str
    layer: LoraLayer
    adapter: str
    B: nn.Parameter
    A: nn.Parameter

    @property
    def scale(self) -> float:
        """Scale of the update."""
        return float(self.layer.scaling[self.adapter])

    @property
    def size(self) -> int:
        """Rank R of the tensors, counting directions that are zero."""
        return len(self.A)

    @property
    def parameters(self) -> int:
        """Number of parameters of one direction."""
        return (self.A.numel() + self.B.numel()) // self.size

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Views of B as `(out, R)` and A as `(R, in)` that share memory with the parameters."""
        return self.B.data.view(len(self.B), -1), self.A.data.view(self.size, -1)

    def live(self) -> Tensor:
        """Bool `(R,)`: which rank directions are in use; squeezed directions are zero in both factors."""
        B, A = self.matrices()
        return B.any(0) | A.any(1)

    @property
    def rank(self) -> int:
        """Number of directions in use."""
        return int(self.live().sum())


def lora_pairs(model: nn.Module, adapter_name: str) -> list[LoraPair]:
    """Factors of every module of an adapter, in the order of the model.

    Raises a ValueError if the adapter is missing, merged or sharded, and a NotImplementedError, which names the module,
    if an update is not `s * B A`.
    """
    layers = {name: module for name, module in plain_modules(model) if isinstance(module, LoraLayer)}
    available = sorted({adapter for layer in layers.values() for adapter in layer.scaling})
    if adapter_name not in available:
        raise ValueError(f"adapter {adapter_name!r} not found; available: {available}.")
    pairs: list[LoraPair] = []
    seen: set[int] = set()
    for name, layer in layers.items():
        if adapter_name not in layer.scaling:
            continue
        pair = _pair(name.removeprefix("module.").removeprefix("base_model.model."), layer, adapter_name)
        if {id(pair.A), id(pair.B)} & seen:
            raise NotImplementedError(
                f"{pair.name} shares its factors with another module; tied adapters keep their rank."
            )
        seen |= {id(pair.A), id(pair.B)}
        pairs.append(pair)
    return pairs


def squeeze_pair(
    pair: LoraPair, rank: int, *, shrink: bool, new_scale: float | None = None, optimizer: Projection | None = None
) -> None:
    """Replaces the factors by balanced factors of the best approximation of a rank, at most `pair.size`.

    With `shrink` the tensors become smaller. Otherwise the other directions are set to zero in both factors, and stay
    zero under SGD, Adam, AdamW and Adafactor since each factor's gradient is proportional to the other. The scale stays
    without a `new_scale`.
    """
    old_scale, scale = pair.scale, kept_scale(pair.scale) if new_scale is None else new_scale
    B, A = pair.matrices()
    low = truncate_factors(B, A, rank, scale=old_scale, new_scale=scale)
    new_B, new_A, left, right = low.B, low.A, low.left, low.right
    if not shrink:
        padding = (0, pair.size - rank)
        new_B, left = nn.functional.pad(new_B, padding), nn.functional.pad(left, padding)
        new_A, right = nn.functional.pad(new_A, (0, 0, *padding)), nn.functional.pad(right, (0, 0, *padding))
    if optimizer is not None:
        optimizer.follow(pair, left, right, scale / old_scale if old_scale else 0.0)
    write_factors(pair, new_B, new_A, scale)


def drop_zero_directions(pair: LoraPair, new_scale: float | None = None) -> None:
    """Removes directions that are zero in both factors from the tensors; the update does not change."""
    alive = pair.live()
    alive[0] |= not alive.any()  # a layer needs a rank of at least 1
    B, A = pair.matrices()
    scale = kept_scale(pair.scale) if new_scale is None else new_scale
    ratio = pair.scale / scale
    root = abs(ratio) ** 0.5
    write_factors(pair, math.copysign(root, ratio) * B[:, alive], root * A[alive], scale)


@torch.no_grad()
def write_factors(pair: LoraPair, B: Tensor, A: Tensor, scale: float) -> None:
    """Writes factors B `(out, r)` and A `(r, in)` into the same Parameter objects and updates the layer's fields."""
    layer, name, rank = pair.layer, pair.adapter, len(A)
    scale_bias(pair, pair.scale / scale)
    pair.B.grad = pair.A.grad = None
    if rank == pair.size:
        pair.matrices()[0].copy_(B)
        pair.matrices()[1].copy_(A)
    else:
        _replace_data(pair.B, B.reshape(len(B), rank, *pair.B.shape[2:]))
        _replace_data(pair.A, A.reshape(rank, *pair.A.shape[1:]))
    layer.r[name] = rank
    layer.scaling[name] = scale
    layer.lora_alpha[name] = alpha_of(scale, rank, bool(layer.use_rslora.get(name)))
    for module, attributes in (
        (layer.lora_A, ("out_features", "out_channels")),
        (layer.lora_B, ("in_features", "in_channels")),
    ):
        for attribute in attributes:
            if name in module and hasattr(module[name], attribute):
                setattr(module[name], attribute, rank)


def scale_bias(pair: LoraPair, ratio: float) -> None:
    """Multiplies the bias of B, if any, by `ratio`: peft applies the scale to it too, so a new scale must be undone."""
    bias = getattr(pair.layer.lora_B[pair.adapter], "bias", None) if pair.adapter in pair.layer.lora_B else None
    if bias is not None:
        bias.data *= ratio


def _replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Replaces a parameter's data by data of another shape.

    A loss that is still referenced keeps the parameter's gradient accumulator alive, which expects the old shape and
    fails in the next backward pass. Autograd drops the accumulator when the dtype changes, so it is changed twice.
    """
    dtype = parameter.dtype
    parameter.data = torch.empty(
        0, dtype=torch.float64 if dtype != torch.float64 else torch.float32, device=parameter.device
    )
    parameter.data = data.to(dtype).contiguous()


class Projection:
    """Adapts an optimizer's state to new factors; `was_reset` says whether mode "project" had to delete some.

    In mode "project" the moments of torch's Adam and AdamW are mapped, and the state of other optimizers is reset;
    "reset" deletes the state of the two parameters, so the optimizer initializes it at its next step.
    """

    MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"})

    def __init__(self, optimizer: torch.optim.Optimizer, mode: str) -> None:
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        self.optimizer, self.mode = optimizer, mode
        self.was_reset = False

    @torch.no_grad()
    def follow(self, pair: LoraPair, left: Tensor, right: Tensor, ratio: float) -> None:
        """Maps or deletes the state of a pair's parameters; call it before the new factors are written.

        `B' = B left` with left `(R, r)`, `A' = right A` with right `(r, R)`; `ratio` is the new scale by the old one.
        """
        for parameter, over_columns, small in ((pair.B, True, ratio * right.mT), (pair.A, False, ratio * left.mT)):
            state = self.optimizer.state.get(parameter)
            if not state:
                continue
            if self.mode == "reset" or not self._is_adam(parameter, state):
                self.was_reset |= self.mode != "reset"
                self.optimizer.state.pop(parameter)
                continue
            _map_moments(state, over_columns, small)

    def _is_adam(self, parameter: Tensor, state: Mapping[str, Tensor]) -> bool:
        """Whether the state consists of the floating-point moments of torch's Adam or AdamW."""
        floats = all(v.shape == parameter.shape and v.is_floating_point() for k, v in state.items() if k != "step")
        return (
            isinstance(self.optimizer, (torch.optim.Adam, torch.optim.AdamW))
            and state.keys() <= self.MOMENTS
            and floats
        )


def _map_moments(state: dict[str, Tensor], over_columns: bool, small: Tensor) -> None:
    """Maps Adam's moments in place: those of B times `small` (`over_columns`), or `small` times those of A."""

    def mapped(moment: Tensor, matrix: Tensor) -> Tensor:
        wide = moment.reshape(len(moment), -1).double()
        return wide @ matrix if over_columns else matrix @ wide

    first, second = state["exp_avg"], state["exp_avg_sq"]
    along = 0 if over_columns else 1
    new_first, new_second = mapped(first, small), mapped(second, small.square())
    sharpness = first.double().square().sum() / second.double().sum().clamp(min=1e-300)
    wanted = new_first.square().sum(along, keepdim=True) / sharpness.clamp(min=1e-300)
    correction = torch.where(wanted > 0, wanted / new_second.sum(along, keepdim=True).clamp(min=1e-300), 1.0)
    new = {"exp_avg": new_first, "exp_avg_sq": new_second * correction}
    if "max_exp_avg_sq" in state:
        new["max_exp_avg_sq"] = torch.maximum(
            mapped(state["max_exp_avg_sq"], small.square()) * correction, new["exp_avg_sq"]
        )
    for key, value in new.items():
        old = state[key]
        shape = (len(old), -1, *old.shape[2:]) if over_columns else (-1, *old.shape[1:])
        state[key] = value.to(old.dtype).reshape(shape).contiguous()


def _pair(name: str, layer: LoraLayer, adapter: str) -> LoraPair:
    """Factors of one layer; raises if its update is not `s * B A` or the factors are merged or sharded."""
    variant = layer.lora_variant.get(adapter)
    if isinstance(layer, ParamWrapper) or (variant is not None and type(variant).__name__ not in PLAIN_VARIANTS):
        kind = "a targeted parameter" if isinstance(layer, ParamWrapper) else type(variant).__name__
        raise NotImplementedError(f"{name} is {kind}: its update is not one product of two factors, so its rank stays.")
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        raise NotImplementedError(f"{name} is a convolution with groups: its rank belongs to the groups, so it stays.")
    if adapter in layer.merged_adapters:
        raise ValueError(f"adapter {adapter!r} is merged; call unmerge_adapter() first.")
    if adapter in layer.lora_embedding_A:
        B, A = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    else:
        if not isinstance(layer.lora_A[adapter], nn.Module):
            raise NotImplementedError(
                f"{name} is {type(layer).__name__}: its update is not one product of two factors."
            )
        B, A = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    for factor in (B, A):
        if isinstance(factor, DTensor) or hasattr(factor, "ds_id") or factor.ndim < 2 or factor.is_meta:
            raise ValueError(
                f"{name}: the factors are sharded or without data (FSDP, DeepSpeed ZeRO-3, meta device), and a rank "
                "needs whole ones. Train with DDP or on one device, or compress the saved adapter: squeeze_adapter()."
            )
    return LoraPair(name, layer, adapter, B, A)
