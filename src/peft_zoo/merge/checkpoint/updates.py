"""The merged values of one module of the base: updates of all adapters added in float32, rounded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, LoraLayer
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from peft_zoo.kernels.lora.merge import merge_lora, stochastic_round
from peft_zoo.merge.base.exportable import exportable
from peft_zoo.merge.base.hollow import merged_values
from peft_zoo.merge.checkpoint.adapter import NAME, FileLora, OpenAdapter
from peft_zoo.merge.checkpoint.options import MergeOptions
from peft_zoo.merge.checkpoint.vocabulary import with_padding


@dataclass(frozen=True)
class LowRankUpdate:
    """Update `scale * B A` of a weight seen as a matrix.

    Attributes:
        B: Factor `(rows, r)`.
        A: Factor `(r, columns)`.
        scale: Scale of the product.
        transposed: Whether the matrix is the transpose of the weight.
    """

    B: Tensor
    A: Tensor
    scale: float
    transposed: bool


@dataclass(frozen=True)
class ModuleMerge:
    """Everything that adapters do to the parameters of one module of the base.

    Attributes:
        path: Name of the module.
        names: Names in the model of the parameters that may change, the weight first.
        adapters: The adapters, each with the layer of this module if it has one.
        options: Options of the merge.
    """

    path: str
    names: tuple[str, ...]
    adapters: Sequence[tuple[OpenAdapter, Any]]
    options: MergeOptions

    def merged(self, values: Mapping[str, Tensor], infos: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """Returns the new values of all parameters from the old ones, in the dtypes of `infos`, all by name."""
        values = {name: self._whole(name, value) for name, value in values.items()}
        layers = [(adapter, layer) for adapter, layer in self.adapters if layer is not None]
        low_rank = [low_rank_update(layer) for _, layer in layers]
        if self.options.arithmetic == "exact" and all(update is not None for update in low_rank):
            new = self._plus_low_rank(values, layers, [update for update in low_rank if update is not None], infos)
        else:
            new = self._by_layers(values, layers, infos)
        for name in new:
            new[name] = self._with_rows(name, new[name])
        return new

    def _whole(self, name: str, value: Tensor) -> Tensor:
        """Returns the value that the file of an adapter has for a parameter, else the given one."""
        for adapter, _ in self.adapters:
            key = adapter.whole.get(name)
            if key is not None:
                found = adapter.file.read_finite(key).to(value.dtype)
                grown = found.dim() == 2 and len(found) < len(value) and found.shape[1:] == value.shape[1:]
                value = with_padding(found, value) if grown and self.options.vocab == "auto" else found
        return value

    def _with_rows(self, name: str, value: Tensor) -> Tensor:
        """Returns the value with the rows of an embedding that an adapter has trained."""
        for adapter, _ in self.adapters:
            if name in adapter.rows:
                key, places = adapter.rows[name]
                value[list(places)] = adapter.file.read_finite(key).to(value.dtype)
        return value

    def _plus_low_rank(
        self,
        values: Mapping[str, Tensor],
        layers: Sequence[tuple[OpenAdapter, Any]],
        updates: Sequence[LowRankUpdate],
        dtypes: Mapping[str, torch.dtype],
    ) -> dict[str, Tensor]:
        """Adds products of factors without building the update."""
        new = dict(values)
        weight, *others = self.names
        old = values[weight]
        if updates:
            wide = old if old.dtype == dtypes[weight] else old.to(torch.float32)
            matrix = wide.flatten(1)
            matrix = matrix.mT if updates[0].transposed else matrix
            factors = [update.A for update in updates], [update.B for update in updates]
            scales = [adapter.given.weight * update.scale for (adapter, _), update in zip(layers, updates, strict=True)]
            seed = self.options.rounding_seed
            merged = merge_lora(matrix, *factors, scales, seed=seed, inplace=True)
            new[weight] = (merged.mT if updates[0].transposed else merged).reshape(old.shape)
        for name in others:
            added = [
                adapter.given.weight * layer.scaling[NAME] * layer.lora_B[NAME].bias
                for adapter, layer in layers
                if layer.lora_bias[NAME]
            ]
            new[name] = sum(added, start=values[name].float()) if added else values[name]
        return {name: self._rounded(value, dtypes[name]) for name, value in new.items()}

    def _by_layers(
        self,
        values: Mapping[str, Tensor],
        layers: Sequence[tuple[OpenAdapter, Any]],
        dtypes: Mapping[str, torch.dtype],
    ) -> dict[str, Tensor]:
        """Merges the layers of peft one after the other, in float32 unless bits of peft are asked for."""
        exact = self.options.arithmetic == "exact"
        bare = {name: name.rpartition(".")[2] for name in self.names}
        wide = {
            name: value.to(torch.promote_types(value.dtype, torch.float32)) if exact else value.clone()
            for name, value in values.items()
        }
        needs = [pair for pair in layers if depends_on_base(*pair)]
        adds = [pair for pair in layers if not depends_on_base(*pair)]
        for place, (adapter, layer) in enumerate((*needs, *adds)):
            start = wide if place < len(needs) or not exact else {n: torch.zeros_like(v) for n, v in wide.items()}
            found = merged_values(layer, {bare[name]: value.clone() for name, value in start.items()})
            for name in wide:
                new, factor = found[bare[name]], adapter.given.weight
                wide[name] = new if factor == 1 and start is wide else wide[name] + factor * (new - start[name])
        return {name: self._rounded(value, dtypes[name]) for name, value in wide.items()}

    def _rounded(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns a value in its final dtype."""
        seed = self.options.rounding_seed
        if seed is None or value.dtype == dtype or value.dim() < 2:
            return value.to(dtype)
        return stochastic_round(value.flatten(1), dtype, seed).reshape(value.shape)


def check_order(path: str, adapters: Sequence[tuple[OpenAdapter, Any]]) -> None:
    """Raises a ValueError that names the module if two adapters both depend on its weight, so that order matters."""
    needs = [adapter for adapter, layer in adapters if layer is not None and depends_on_base(adapter, layer)]
    if len(needs) > 1:
        raise ValueError(
            f"{path}: adapters {needs[0].given.name!r} and {needs[1].given.name!r} both scale or rotate the weight, "
            "and such updates do not add; merge one into a checkpoint of its own first."
        )


def depends_on_base(adapter: OpenAdapter, layer: Any) -> bool:
    """Whether the update of an adapter depends on the weight that it is added to, or replaces it."""
    if isinstance(layer, FileLora):
        return False
    return exportable(adapter.config) == "with_base" or "weight" not in _parameters(layer)


def _parameters(layer: Any) -> Mapping[str, Any]:
    parameters: Mapping[str, Any] = layer.get_base_layer()._parameters
    return {**parameters, "weight": None} if hasattr(layer, "parameter_name") else parameters


def low_rank_update(layer: Any) -> LowRankUpdate | None:
    """Returns the factors of a LoRA layer of peft or of peft-zoo; None for layers whose update is something else."""
    if isinstance(layer, FileLora):
        return LowRankUpdate(
            *layer.source.factors(layer.name), layer.source.modules[layer.name].scale, layer.transposed
        )
    if not isinstance(layer, LoraLayer) or NAME not in layer.scaling or layer.lora_variant.get(NAME) is not None:
        return None
    found: Any = layer
    base, scale = found.get_base_layer(), found.scaling[NAME]
    if isinstance(layer, LoraEmbedding):
        return LowRankUpdate(found.lora_embedding_B[NAME].data, found.lora_embedding_A[NAME].data, scale, True)
    is_conv = isinstance(layer, (Conv1d, Conv2d, Conv3d)) and base.groups == 1
    if not is_conv and not (isinstance(layer, LoraLinear) and isinstance(base._parameters.get("weight"), nn.Parameter)):
        return None
    B, A = found.lora_B[NAME].weight.data, found.lora_A[NAME].weight.data
    return LowRankUpdate(B.flatten(1), A.flatten(1), scale, not is_conv and bool(found.fan_in_fan_out))
