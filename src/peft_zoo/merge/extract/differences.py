"""The differences of two checkpoints of one model: matrices that a LoRA can hold, and everything else that changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_zoo.io.checkpoint import Checkpoint
from peft_zoo.io.expert_names import is_expert
from peft_zoo.merge.base.empty_model import empty_model
from peft_zoo.merge.base.placement import Group, Placements
from peft_zoo.merge.base.plain_lora import Module

LAYERS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


@dataclass(frozen=True)
class Difference:
    """A matrix that differs.

    Attributes:
        module: Name and kind of its module.
        name: Name of its tensor in the model, or in the files for a single expert.
        transposed: Whether `B A` is the transpose of the stored matrix.
    """

    module: Module
    name: str
    transposed: bool

    def matrix(self, value: Tensor) -> Tensor:
        """Returns a value of the tensor as the matrix `(rows, columns)` of `B A`."""
        found = value.flatten(1)
        return found.mT if self.transposed else found


@dataclass
class Differences:
    """Everything that differs between two checkpoints.

    Attributes:
        matrices: Matrices for LoRAs, by module.
        others: Names of other tensors, by module.
        is_tied: Whether the input embedding is tied to the head.
    """

    matrices: dict[str, Difference] = field(default_factory=dict)
    others: dict[str, list[str]] = field(default_factory=dict)
    is_tied: bool = False


class Pair:
    """Two open checkpoints of one architecture.

    Args:
        base: The checkpoint to start from.
        tuned: The checkpoint that was trained from it.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        for field_name in ("architectures", "quantization_config"):
            one, other = base.config.get(field_name), tuned.config.get(field_name)
            if one != other:
                raise ValueError(
                    f"{field_name}: {base.folder} has {one!r} and {tuned.folder} {other!r}; give two of one."
                )
        if base.config.get("quantization_config") is not None:
            raise NotImplementedError(f"{base.folder}: a quantized checkpoint; give the ones before quantizing.")
        self.base, self.tuned = base, tuned
        self.model = empty_model(tuned)
        self.places = [Placements(empty_model(source), source.tensors) for source in (base, tuned)]
        for places, source in zip(self.places, (base, tuned), strict=True):
            places.check_tensors(source.tensors)

    def read(self, name: str, which: int) -> Tensor:
        """Reads one tensor of the base (0) or of the tuned checkpoint (1), by its name in the model or its key."""
        places, source = self.places[which], (self.base, self.tuned)[which]
        if name in places:
            return places.group(name).assemble(source.read)[name]
        return source.read(name)

    def differences(self) -> Differences:
        """Compares all tensors, one at a time."""
        found = Differences(is_tied=bool(self.model.all_tied_weights_keys))
        modules = dict(self.model.named_modules())
        for group in self.places[1].groups:
            if all(is_expert(f"{key.removesuffix('.weight')}") for key in group.keys):
                self._compare_experts(group, found)
                continue
            for name in group.names:
                if self._differs(name):
                    owner, _, part = name.rpartition(".")
                    self._sort(found, owner, part, modules.get(owner))
        return found

    def _compare_experts(self, group: Group, found: Differences) -> None:
        """Adds the experts of a stacked tensor that differ, each as a linear layer of its own."""
        for key in group.keys:
            if not torch.equal(self.base.read(key), self.tuned.read(key)):
                name, shape = key.removesuffix(".weight"), self.tuned.tensors[key].shape
                found.matrices[name] = Difference(Module(name, "linear", (shape[1],), torch.float32), key, False)

    def _differs(self, name: str) -> bool:
        if name not in self.places[0]:
            raise ValueError(f"{name}: {self.base.folder} has no such tensor; give the base that was trained.")
        one, other = self.read(name, 0), self.read(name, 1)
        return one.shape != other.shape or not torch.equal(one.to(other.dtype), other)

    def _sort(self, found: Differences, owner: str, part: str, layer: Any) -> None:
        """Adds a tensor that differs to the matrices, or to the other tensors."""
        name = f"{owner}.{part}"
        same = self.read(name, 0).shape == self.read(name, 1).shape
        whole = isinstance(layer, nn.Embedding) and found.is_tied
        if part != "weight" or not isinstance(layer, LAYERS) or not same or whole or getattr(layer, "groups", 1) != 1:
            found.others.setdefault(owner, []).append(part)
            return
        shape = tuple(layer.weight.shape)
        transposed = isinstance(layer, (Conv1D, nn.Embedding))
        kind: Any = "embedding" if isinstance(layer, nn.Embedding) else "linear" if len(shape) == 2 else "conv"
        inner = (shape[0],) if transposed else shape[1:]
        found.matrices[owner] = Difference(Module(owner, kind, inner, torch.float32), name, transposed)

    def deltas(self, one: Difference) -> tuple[Tensor, Tensor]:
        """Returns the difference of a matrix in float32, and the tuned matrix in its own dtype."""
        tuned = one.matrix(self.read(one.name, 1))
        return tuned.float() - one.matrix(self.read(one.name, 0)).float(), tuned
