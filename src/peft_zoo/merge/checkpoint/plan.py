"""What a merge does to each tensor of a checkpoint, found from headers and configurations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_zoo.adapters.base.loading import check_trained_modules, same_values
from peft_zoo.io.checkpoint import Checkpoint
from peft_zoo.io.extra_keys import is_named
from peft_zoo.io.header import TensorInfo
from peft_zoo.io.safetensors import FLOATS, check_finite
from peft_zoo.merge.base.hollow import hollow_model, make_hollow
from peft_zoo.merge.base.placement import Group, Placements
from peft_zoo.merge.base.pump import Change
from peft_zoo.merge.base.skeleton import PREFIX
from peft_zoo.merge.base.stored_formats import FLOAT_DTYPES
from peft_zoo.merge.checkpoint.adapter import FileLora, OpenAdapter, add_to_model, plain_layers, sort_tensors
from peft_zoo.merge.checkpoint.config_changes import dtype_fields, resized, untie
from peft_zoo.merge.checkpoint.options import MergeOptions
from peft_zoo.merge.checkpoint.quantized import QUANTIZATION, QuantizedBase
from peft_zoo.merge.checkpoint.report import Action, TensorReport
from peft_zoo.merge.checkpoint.ties import Ties, plan_ties
from peft_zoo.merge.checkpoint.updates import ModuleMerge, check_order, low_rank_update
from peft_zoo.merge.checkpoint.vocabulary import adapter_vocabulary, embedding_names

SAMPLED = 64  # rows of a tensor from which the report's figures come


@dataclass
class MergePlan:
    """Changes of a checkpoint.

    Attributes:
        source: The open checkpoint.
        options: Options of the merge.
        changes: Tensors of the result that are computed.
        removed: Names of tensors of the files that the result lacks.
        config_changes: New values of `config.json` by path.
        warnings: Sentences for the report.
        rows: What became of each changed tensor, filled in while they are computed.
    """

    source: Checkpoint
    options: MergeOptions
    changes: list[Change] = field(default_factory=list)
    removed: set[str] = field(default_factory=set)
    config_changes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    rows: dict[str, TensorReport] = field(default_factory=dict)


class Part(NamedTuple):
    """Tensors that change together, and what changes them.

    Attributes:
        groups: Tensors of the files and of the model, by the id of the group.
        modules: Modules that change at least one of them.
    """

    groups: dict[int, Group]
    modules: list[ModuleMerge]


class Planner:
    """Builds the plan of a merge.

    Args:
        source: The open checkpoint of the base.
        adapters: The opened adapters; their layers are added.
        options: Options of the merge.
    """

    def __init__(self, source: Checkpoint, adapters: Sequence[OpenAdapter], options: MergeOptions) -> None:
        self.source, self.adapters, self.options = source, adapters, options
        self.plan = MergePlan(source, options)
        self.dtype = FLOAT_DTYPES.get(options.dtype)  # None: that of each tensor
        self._training_vocabulary: Mapping[str, Any] = {}
        self._is_resized = False
        self._own: Mapping[str, str] = {}
        self._added: dict[str, Group] = {}  # tensors that the files lack
        self.model = hollow_model(source)
        self.placements = Placements(self.model, source.tensors)
        self.quantized = QuantizedBase(source, self.model, self.placements, options)
        packed = [group for group in self.placements.groups if group.keys[0] in self.quantized]
        if QUANTIZATION not in source.config or packed:
            self.placements.check_tensors(source.tensors, {name for group in packed for name in group.names})
        self._fit_vocabulary()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        self.ties = Ties.of(self.model)
        self._add_adapters()
        self._check_embeddings()
        self.modules = self._modules()

    def build(self) -> MergePlan:
        """Returns the plan; raises a ValueError or NotImplementedError if the merge is impossible."""
        self._tie()
        self.plan.changes += [self._change(part) for part in self._parts()]
        self.plan.removed |= self.quantized.superfluous
        self.plan.changes += self._conversions({key for change in self.plan.changes for key in change.infos})
        if self.quantized.is_dequantized and QUANTIZATION in self.source.config:
            self.plan.config_changes[QUANTIZATION] = None
        if self.dtype is not None and not self.source.is_diffusers:  # whose models have no such field
            self.plan.config_changes.update(dtype_fields(self.source.config, self.options.dtype))
        return self.plan

    # ---- reading the inputs ----

    def _add_adapters(self) -> None:
        """Finds the layers of all adapters: in the files of plain LoRAs, else in models of their own."""
        plain = [plain_layers(adapter, self.model) for adapter in self.adapters]
        if self.options.arithmetic == "exact" and None not in plain:
            for adapter, layers in zip(self.adapters, plain, strict=True):
                sort_tensors(adapter, self.model, self.ties.members)
                check_trained_modules(adapter.config, adapter.file.tensors, self.model)
                adapter.layers = layers or {}
            return
        for place, adapter in enumerate(self.adapters):
            model = self.model if place == 0 else hollow_model(self.source, self._training_vocabulary)
            make_hollow(model, self._layer_dtype)
            add_to_model(adapter, model, self.ties.members)

    def _check_embeddings(self) -> None:
        """Raises a ValueError for an embedding with other values than the base's that nothing of the adapter trained.

        peft saves embeddings with an adapter of them, and if the vocabulary has grown. Any other one is an extra tensor
        that would replace a weight of the base.
        """
        names = {f"{name}.weight" for name in embedding_names(self.model).values()}
        for adapter in self.adapters:
            modules = {target.rpartition(".")[0] for target in adapter.layers}
            for name in sorted(names & adapter.whole.keys()):
                key = adapter.whole[name]
                tied = getattr(adapter.config, "ensure_weight_tying", False)  # the head is saved with the embedding
                trained = tied or is_named(key.removeprefix(PREFIX), vars(adapter.config), modules)
                if self._training_vocabulary or trained or name not in self.placements:
                    continue
                if not same_values(adapter.file.read(key), self.placements.group(name).assemble(self._read)[name]):
                    raise ValueError(
                        f"{key} of {adapter.given.name!r} would replace an embedding of the base that the adapter does "
                        "not train; remove it, or name its module in modules_to_save."
                    )
                adapter.whole = {other: found for other, found in adapter.whole.items() if other != name}

    def _fit_vocabulary(self) -> None:
        """Builds the model with the number of tokens of the adapters."""
        names = embedding_names(self.model)
        if "input" not in names:
            return
        rows = self.model.get_parameter(f"{names['input']}.weight").shape[0]
        sizes = {adapter_vocabulary(adapter.file.tensors, names, rows) for adapter in self.adapters}
        if len(sizes) > 1:
            raise ValueError(
                f"the adapters are for {' and '.join(map(str, sorted(sizes)))} tokens; merge one at a time."
            )
        size = next(iter(sizes), rows)
        if size != rows:
            self._training_vocabulary = resized(self.source.config, rows, size)
            self.model = hollow_model(self.source, self._training_vocabulary)
            self.placements = Placements(self.model, self.source.tensors)
            self._is_resized = size > rows or self.options.vocab == "adapter"
            self.plan.config_changes.update(self._training_vocabulary if self._is_resized else {})

    def _layer_dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        """Dtype of a parameter of the model in which layers of peft merge."""
        if self.options.arithmetic == "exact":
            return torch.float32
        group = self.placements.group(name) if name in self.placements else None
        return self.source.tensors[group.keys[0]].dtype if group is not None else tensor.dtype

    def _modules(self) -> dict[str, ModuleMerge]:
        """Returns what happens to each module of the model that an adapter changes, by its path."""
        weights: dict[str, list[str]] = {}
        for adapter in self.adapters:
            for name in (*adapter.layers, *adapter.whole, *adapter.rows):
                weights.setdefault(name, [])
        modules = {}
        for name in weights:
            layers = [(adapter, adapter.layers.get(name)) for adapter in self.adapters]
            names = [name]
            bias = f"{name.rpartition('.')[0]}.bias"
            if bias in self.shapes and any(layer is not None and _changes_bias(layer) for _, layer in layers):
                names.append(bias)
            check_order(name, layers)
            modules[name] = ModuleMerge(name, tuple(names), layers, self.options)
        both = {name for module in modules.values() for name in module.names[1:]}
        return {name: module for name, module in modules.items() if name not in both}

    # ---- ties ----

    def _tie(self) -> None:
        """Gives tied tensors that differ after the merge values of their own."""
        results = {name: self._signature(module) for name, module in self.modules.items()}
        on_disk = {name for name in self.shapes if name in self.placements}
        ties = plan_ties(self.ties, results, on_disk, self.options.tied)
        for name, origin in ties.shared.items():
            old = self.modules[origin]
            self.modules[name] = ModuleMerge(name, (name,), old.adapters, self.options)
        self._own = dict(ties.own)
        if ties.untied:
            self.plan.config_changes.update(untie(self.source.config))
        # Tensors that stay tied are in the files once, under the name of another one.
        tied = {name for members in self.ties.members for name in members}
        for name in tied & self.modules.keys() - on_disk - self._own.keys():
            del self.modules[name]
        for name in self._own:
            self.modules.setdefault(name, ModuleMerge(name, (name,), [(a, None) for a in self.adapters], self.options))
        if self._own and not ties.untied:
            self.plan.warnings.append(
                f"{', '.join(self._own)} now differ from the tensor that they were tied to; programs that tie them "
                "because of config.json lose that."
            )

    def _signature(self, module: ModuleMerge) -> tuple[Any, ...]:
        """Returns a value that is equal for modules to which the same happens."""
        found: list[Any] = []
        for adapter, layer in module.adapters:
            if module.path in adapter.whole:
                found.append(_digest(adapter, adapter.whole[module.path]))
            if module.path in adapter.rows:
                key, places = adapter.rows[module.path]
                found.append((_digest(adapter, key), places))
            found.append(None if layer is None else id(layer))
        return tuple(found)

    # ---- changes ----

    def _parts(self) -> list[Part]:
        """Returns the tensors of the files that change together, with the modules that change them."""
        owner: dict[int, Part] = {}
        for module in self.modules.values():
            groups = {id(group): group for group in map(self._place, module.names)}
            joined = {id(owner[key]): owner[key] for key in groups if key in owner}
            part = Part(groups, [])
            for other in joined.values():
                part = Part({**other.groups, **part.groups}, other.modules + part.modules)
            part.modules.append(module)
            owner.update(dict.fromkeys(part.groups, part))
        return list({id(part): part for part in owner.values()}.values())

    def _place(self, name: str) -> Group:
        """Returns the tensors of the files for one of the model, also one that the files lack."""
        if name in self.placements or (name not in self._own and name not in self.shapes):
            return self.placements.group(name)
        return self._added.setdefault(name, Group((name,), (name,)))

    def _change(self, part: Part) -> Change:
        """Returns the computation of tensors that change together."""
        infos: dict[str, TensorInfo] = {}
        dtypes: dict[str, torch.dtype] = {}
        for group in part.groups.values():
            for key in group.keys:
                old = self._old_info(key)
                infos[key] = TensorInfo(self.dtype or old.dtype, old.shape)
            dtypes.update(dict.fromkeys(group.names, infos[group.keys[0]].dtype))
            if len(group.keys) == len(group.names) == 1 and self._resizes(group.names[0]):
                infos[group.keys[0]] = TensorInfo(infos[group.keys[0]].dtype, self.shapes[group.names[0]])
        compute = self._compute(part, dtypes)
        if self.quantized.is_requantized(infos):
            return self.quantized.requantized(infos, compute, self.plan.rows)
        return Change(infos, compute)

    def _conversions(self, merged: Collection[str]) -> Iterator[Change]:
        """Yields the changes of tensors that no adapter changes, but that get another dtype or are dequantized."""
        for key, info in self.source.tensors.items():
            if key in merged or key in self.plan.removed:
                continue
            is_packed = key in self.quantized and self.quantized.is_dequantized
            old = self.quantized.info(key) if is_packed else info
            is_float = old.dtype in FLOATS
            new = TensorInfo(self.dtype if self.dtype is not None and is_float else old.dtype, old.shape)
            if is_packed or new != info:
                dtype = str(new.dtype).removeprefix("torch.")
                self.plan.rows[key] = TensorReport(key, "converted", dtype)
                yield Change({key: new}, partial(self._converted, key, new.dtype, is_packed))

    def _converted(self, key: str, dtype: torch.dtype, is_packed: bool) -> dict[str, Tensor]:
        """Reads a tensor and changes its dtype; `is_packed`: it is dequantized first."""
        value = self.quantized.read(key) if is_packed else self.source.read(key)
        return {key: fitting(key, value.to(dtype))}

    def _resizes(self, name: str) -> bool:
        """Whether a tensor gets the shape of an adapter's, which has more tokens or is to be taken as it is."""
        return self._is_resized and any(name in adapter.whole for adapter in self.adapters)

    def _old_info(self, key: str) -> TensorInfo:
        """Returns dtype and shape of a tensor of the files before the merge, dequantized."""
        if key in self.quantized:
            return self.quantized.info(key)
        if key in self.source.tensors:
            return self.source.tensors[key]
        origin = self._own.get(key)
        if origin is not None and origin in self.placements:
            return self._old_info(self.placements.group(origin).keys[0])
        for adapter in self.adapters:
            if key in adapter.whole:
                return adapter.info(adapter.whole[key])
        raise ValueError(f"{key}: the base has no such tensor; give the adapter's own base.")

    def _read(self, key: str) -> Tensor:
        """Reads a tensor of the base, dequantized; one that the files lack is the one that it was tied to."""
        if key in self.quantized:
            return self.quantized.read(key)
        if key in self.source.tensors:
            return self.source.read(key)
        origin = self._own.get(key)
        if origin is not None:
            return self.placements.group(origin).assemble(self._read)[origin]
        info = self._old_info(key)
        return torch.zeros(info.shape, dtype=info.dtype)

    def _compute(self, part: Part, dtypes: Mapping[str, torch.dtype]) -> Callable[[], Mapping[str, Tensor]]:
        def compute() -> Mapping[str, Tensor]:
            old = {key: self._read(key) for group in part.groups.values() for key in group.keys}
            before = {key: (tensor.shape, sample(tensor).clone()) for key, tensor in old.items()}
            values: dict[str, Tensor] = {}
            for group in part.groups.values():
                values |= group.assemble(old.__getitem__)
            del old
            for module in part.modules:
                values.update(module.merged({name: values[name] for name in module.names}, dtypes))
            values = {name: value.to(dtypes[name]) for name, value in values.items()}
            new: dict[str, Tensor] = {}
            for group in part.groups.values():
                new |= group.split(values)
            for key, tensor in new.items():
                fitting(key, tensor)
                self.plan.rows[key] = self._row(key, *before[key], tensor, part.modules)
            return new

        return compute

    def _row(
        self, key: str, shape: tuple[int, ...], old: Tensor, new: Tensor, modules: Sequence[ModuleMerge]
    ) -> TensorReport:
        """Reports what became of one tensor, from its shape and sample before and its values after the merge."""
        adapters = tuple(dict.fromkeys(a.given.name for module in modules for a in _contributors(module)))
        action: Action = "merged" if any(layer is not None for m in modules for _, layer in m.adapters) else "replaced"
        action = action if key in self.source.tensors else "added"
        dtype = str(new.dtype).removeprefix("torch.")
        if shape != new.shape:
            return TensorReport(key, action, dtype, adapters)
        now = sample(new)
        size, change = float(old.float().norm()), float((now.float() - old.float()).norm())
        unchanged = float((now == old).float().mean()) if now.dtype == old.dtype else None
        return TensorReport(key, action, dtype, adapters, change / size if size else None, unchanged)


def sample(tensor: Tensor) -> Tensor:
    """Returns at most `SAMPLED` rows of a tensor, evenly spaced."""
    return tensor if tensor.dim() < 2 else tensor[:: max(1, -(-len(tensor) // SAMPLED))]


def fitting(key: str, tensor: Tensor) -> Tensor:
    """Returns a tensor; raises a ValueError that names it if a value is too large for its dtype."""
    try:
        return check_finite(key, tensor)
    except ValueError as error:
        raise ValueError(
            f"{key}: a value of the result is not finite in {tensor.dtype}; pass dtype='float32', or repair the base "
            "or the adapter."
        ) from error


def _digest(adapter: OpenAdapter, key: str) -> str:
    """Returns a checksum of the bytes of a tensor in an adapter's file."""
    digest = hashlib.sha256()
    for piece in adapter.file.pieces(key):
        digest.update(piece.numpy().data)
    return digest.hexdigest()


def _contributors(module: ModuleMerge) -> list[OpenAdapter]:
    return [
        adapter
        for adapter, layer in module.adapters
        if layer is not None or any(name in adapter.whole or name in adapter.rows for name in module.names)
    ]


def _changes_bias(layer: Any) -> bool:
    """Whether merging a layer may change the bias of its module."""
    if isinstance(layer, FileLora):
        return False
    return low_rank_update(layer) is None or any(getattr(layer, "lora_bias", {}).values())
