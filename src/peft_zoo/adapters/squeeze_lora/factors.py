"""The factors of a LoRA in a model, seen as pairs of matrices, and how a pair takes a smaller rank.

Every change is a pair of small maps (`peft_zoo.kernels.low_rank.factored`): ``B' = B P_B``, ``A' = P_A A``. Adam's
first moments follow exactly, since ``dL/dB' = f dL/dB P_A^T`` and ``dL/dA' = f P_B^T dL/dA`` with the ratio of scales
``f = s'/s``. Its second moments have no exact image. The squares of the maps overestimate them where gradients are
mostly mean, so each direction is rescaled to the ratio of squared first to second moments that the tensor had before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from peft_zoo.io.lora_ranks import alpha_of, kept_scale
from peft_zoo.kernels.low_rank.factored import truncate_factors

PLAIN = ("DoraLinearVariant", "DoraEmbeddingVariant", "DoraConv1dVariant", "DoraConv2dVariant", "DoraConv3dVariant")
"""Variants of peft's LoRA layers whose update still is `scale * B A`, to which they add something of their own."""


@dataclass(frozen=True)
class LoraPair:
    """Factors of one adapted module; `scale * B A` is its update, `(out, in)`, kernels flattened, of an embedding
    transposed.

    Attributes:
        name: The module's name in the base model.
        layer: peft's layer.
        adapter: Name of the adapter.
        B: Parameter of `(out, R, ...)`.
        A: Parameter of `(R, in, ...)`.
    """

    name: str
    layer: LoraLayer
    adapter: str
    B: nn.Parameter
    A: nn.Parameter

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return float(self.layer.scaling[self.adapter])

    @property
    def size(self) -> int:
        """R, the number of directions that the tensors have room for."""
        return len(self.A)

    @property
    def parameters(self) -> int:
        """Parameters of one rank."""
        return (self.A.numel() + self.B.numel()) // self.size

    def matrices(self) -> tuple[Tensor, Tensor]:
        """B of `(out, R)` and A of `(R, in)`, views that share memory with the parameters."""
        return self.B.data.view(len(self.B), -1), self.A.data.view(self.size, -1)

    def live(self) -> Tensor:
        """Which directions are in use, `(R,)`: a squeezed one is zero in both factors."""
        B, A = self.matrices()
        return B.any(0) | A.any(1)

    @property
    def rank(self) -> int:
        """The number of directions in use."""
        return int(self.live().sum())


def lora_pairs(model: nn.Module, adapter_name: str) -> list[LoraPair]:
    """The factors of every module that an adapter adapts, in the order of the model.

    Raises:
        ValueError: If there is no such adapter, it is merged, or its tensors are sharded.
        NotImplementedError: If a module's update is not a plain product of two factors, naming the module.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    available = sorted({adapter for layer in layers.values() for adapter in layer.scaling})
    if adapter_name not in available:
        raise ValueError(f"adapter {adapter_name!r} not found; available: {available}.")
    pairs: list[LoraPair] = []
    seen: set[int] = set()
    for name, layer in layers.items():
        if adapter_name not in layer.scaling:
            continue
        pair = _pair(_plain_name(name), layer, adapter_name)
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
    """Gives a pair the best approximation of its update that has a smaller rank, in balanced factors.

    Args:
        pair: The factors.
        rank: Directions to keep, at most `pair.size`; with `pair.rank` nothing is lost.
        shrink: Whether the tensors get smaller; otherwise the rest is set to zero in both factors, which training with
            SGD, Adam, AdamW or Adafactor leaves at zero, since the gradient of one is proportional to the other.
        new_scale: Scale of the new product; None keeps the old one.
        optimizer: What to do with the optimizer's state of the two parameters.
    """
    old_scale, scale = pair.scale, kept_scale(pair.scale) if new_scale is None else new_scale
    B, A = pair.matrices()
    low = truncate_factors(B, A, rank, scale=old_scale, new_scale=scale)
    new_B, new_A, left, right = low.B, low.A, low.left, low.right
    if not shrink:
        room = (0, pair.size - rank)  # zeros for the other directions
        new_B, left = nn.functional.pad(new_B, room), nn.functional.pad(left, room)
        new_A, right = nn.functional.pad(new_A, (0, 0, *room)), nn.functional.pad(right, (0, 0, *room))
    if optimizer is not None:
        optimizer.follow(pair, left, right, scale / old_scale if old_scale else 0.0)
    write_factors(pair, new_B, new_A, scale)


def drop_dead_directions(pair: LoraPair, new_scale: float | None = None) -> None:
    """Takes the directions out of the tensors that are zero in both factors; the update stays what it was."""
    alive = pair.live()
    alive[0] |= not alive.any()  # a module keeps one
    B, A = pair.matrices()
    scale = kept_scale(pair.scale) if new_scale is None else new_scale
    ratio = pair.scale / scale
    root = abs(ratio) ** 0.5
    write_factors(pair, math.copysign(root, ratio) * B[:, alive], root * A[alive], scale)


@torch.no_grad()
def write_factors(pair: LoraPair, B: Tensor, A: Tensor, scale: float) -> None:
    """Puts new factors into the same Parameter objects, and what peft knows of their rank into the layer."""
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
    """Multiplies the bias of B, if there is one: peft scales it too, so it takes the inverse of a change of scale."""
    bias = getattr(pair.layer.lora_B[pair.adapter], "bias", None) if pair.adapter in pair.layer.lora_B else None
    if bias is not None:
        bias.data *= ratio


def _replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Gives a parameter data of another shape.

    A loss that is still held keeps the parameter's gradient accumulator alive, which remembers the old shape and fails
    the next backward pass. Autograd drops it when the dtype changes, hence the detour.
    """
    dtype = parameter.dtype
    parameter.data = torch.empty(
        0, dtype=torch.float64 if dtype != torch.float64 else torch.float32, device=parameter.device
    )
    parameter.data = data.to(dtype).contiguous()


class Projection:
    """Lets an optimizer's state follow the factors.

    Args:
        optimizer: The optimizer, possibly wrapped by accelerate.
        mode: `"project"` maps the moments of torch's Adam and AdamW; the state of every other optimizer, and of all
            with `"reset"`, is dropped, and the optimizer starts those two tensors anew at its next step.
    """

    MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"})

    def __init__(self, optimizer: torch.optim.Optimizer, mode: str) -> None:
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        self.optimizer, self.mode = optimizer, mode
        self.was_reset = False  # whether state was dropped that should have followed

    @torch.no_grad()
    def follow(self, pair: LoraPair, left: Tensor, right: Tensor, ratio: float) -> None:
        """Maps the state of a pair's parameters, before they are written.

        Args:
            pair: With the factors as they were.
            left: `(R, r)`, `B' = B left`.
            right: `(r, R)`, `A' = right A`.
            ratio: New scale over old.
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
        floats = all(v.shape == parameter.shape and v.is_floating_point() for k, v in state.items() if k != "step")
        return (
            isinstance(self.optimizer, (torch.optim.Adam, torch.optim.AdamW))
            and state.keys() <= self.MOMENTS
            and floats
        )


def _map_moments(state: dict[str, Tensor], over_columns: bool, small: Tensor) -> None:
    """Replaces Adam's moments of one factor; `small` is `(R, r)` for B, `(r, R)` for A."""

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
    variant = layer.lora_variant.get(adapter)
    if isinstance(layer, ParamWrapper) or (variant is not None and type(variant).__name__ not in PLAIN):
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


def _plain_name(name: str) -> str:
    """The name inside the base model, without what peft, DDP and torch.compile put before it."""
    for wrapper in ("module.", "_orig_mod.", "base_model.model."):
        name = name.removeprefix(wrapper)
    return name


__all__: list[str] = []
