"""What a merge does to each tensor of a checkpoint, found from headers and configurations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft_zoo.adapters.base.loading import check_trained_modules
from peft_zoo.io.checkpoint import Checkpoint
from peft_zoo.io.header import TensorInfo
from peft_zoo.merge.base.hollow import hollow_model, make_hollow
from peft_zoo.merge.base.placement import Group, Placements
from peft_zoo.merge.base.pump import Change
from peft_zoo.merge.checkpoint.adapter import FileLora, OpenAdapter, add_to_model, plain_layers, sort_tensors
from peft_zoo.merge.checkpoint.options import MergeOptions
from peft_zoo.merge.checkpoint.quantized import QUANTIZATION, QuantizedBase
from peft_zoo.merge.checkpoint.report import Action, TensorReport
from peft_zoo.merge.checkpoint.ties import Ties, plan_ties, untie
from peft_zoo.merge.checkpoint.updates import ModuleMerge, low_rank_update
from peft_zoo.merge.checkpoint.vocabulary import adapter_vocabulary, embedding_names, resized

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
        self.model = hollow_model(source)
        self._fit_vocabulary()
        self.placements = Placements(self.model, source.tensors)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        self.quantized = QuantizedBase(source, self.model, self.placements, options)
        self._check_base()
        self.ties = Ties.of(self.model)
        self._add_adapters()
        self.modules = self._modules()

    def build(self) -> MergePlan:
        """Returns the plan; raises a ValueError or NotImplementedError if the merge is impossible."""
        self._tie()
        for group, modules in self._groups():
            self.plan.changes.append(self._change(group, modules))
        self.plan.removed |= self.quantized.superfluous
        merged = {key for change in self.plan.changes for key in change.infos}
        for key, change in self.quantized.dense_changes(FLOATS.get(self.options.dtype), merged):
            self.plan.changes.append(change)
            dtype = str(change.infos[key].dtype).removeprefix("torch.")
            self.plan.rows[key] = TensorReport(key, "converted", dtype)
        if self.quantized.is_dequantized and QUANTIZATION in self.source.config:
            self.plan.config_changes[QUANTIZATION] = None
        return self.plan

    # ---- reading the inputs ----

    def _add_adapters(self) -> None:
        """Finds the layers of all adapters: in the files of plain LoRAs, else in models of their own."""
        plain = [plain_layers(adapter, self.model) for adapter in self.adapters]
        if self.options.arithmetic == "exact" and None not in plain:
            for adapter, layers in zip(self.adapters, plain, strict=True):
                sort_tensors(adapter, self.model)
                check_trained_modules(adapter.config, adapter.file.tensors, self.model)
                adapter.layers = layers or {}
            return
        for place, adapter in enumerate(self.adapters):
            model = self.model if place == 0 else hollow_model(self.source, self._training_vocabulary)
            make_hollow(model, self._layer_dtype)
            add_to_model(adapter, model)

    def _check_base(self) -> None:
        """Raises a ValueError for a tensor of the base that is missing or has another shape than its model's."""
        embeddings = {f"{name}.{part}" for name in embedding_names(self.model).values() for part in ("weight", "bias")}
        packed = {name for group in self.placements.groups if group.keys[0] in self.quantized for name in group.names}
        self.placements.check_tensors(self.source.tensors, embeddings | packed)

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
            self._is_resized = size > rows or self.options.vocab == "adapter"
            self.plan.config_changes.update(self._training_vocabulary if self._is_resized else {})

    _training_vocabulary: Mapping[str, Any] = {}
    _is_resized = False

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

    _own: Mapping[str, str] = {}

    def _signature(self, module: ModuleMerge) -> tuple[Any, ...]:
        """Returns a value that is equal for modules to which the same happens."""
        found: list[Any] = []
        for adapter, layer in module.adapters:
            key = adapter.whole.get(module.path)
            if key is not None:
                digest = hashlib.sha256()
                for piece in adapter.file.pieces(key):
                    digest.update(piece.numpy().data)
                found.append(digest.hexdigest())
            if module.path in adapter.rows:
                own, places = adapter.rows[module.path]
                found.append((adapter.file.read(own).double().sum().item(), places))
            found.append(None if layer is None else id(layer))
        return tuple(found)

    # ---- changes ----

    def _groups(self) -> list[tuple[Group, list[ModuleMerge]]]:
        """Returns the tensors of the files that change together, with the modules that change them."""
        found: dict[int, tuple[Group, list[ModuleMerge]]] = {}
        for module in self.modules.values():
            groups = [self._place(name) for name in module.names]
            first = groups[0]
            if any(not group.is_plain for group in groups[1:]) or (not first.is_plain and len(groups) > 1):
                raise NotImplementedError(f"{module.path}: its weight and bias are converted while they are loaded.")
            if len(groups) > 1:
                first = Group(tuple(g.keys[0] for g in groups), tuple(g.names[0] for g in groups))
            entry = found.setdefault(id(first), (first, []))
            entry[1].append(module)
        self._kept_groups = [group for group, _ in found.values()]  # ids stay valid while they exist
        return list(found.values())

    def _place(self, name: str) -> Group:
        """Returns the tensors of the files for one of the model, also one that the files lack."""
        if name in self.placements:
            return self.placements.group(name)
        if name not in self._own and name not in self.shapes:
            return self.placements.group(name)  # raises
        return Group((name,), (name,))

    def _change(self, group: Group, modules: Sequence[ModuleMerge]) -> Change:
        """Returns the computation of a group of tensors."""
        dtypes, infos = {}, {}
        for key in group.keys:
            old = self._old_info(key, group)
            infos[key] = TensorInfo(FLOATS.get(self.options.dtype, old.dtype), old.shape)
        for name in group.names:
            dtypes[name] = infos[group.keys[0]].dtype
        if group.is_plain or len(group.keys) == len(group.names):
            for key, name in zip(group.keys, group.names, strict=True):
                if self._resizes(name):
                    infos[key] = TensorInfo(infos[key].dtype, self.shapes[name])
        compute = self._compute(group, modules, dtypes)
        if self.quantized.is_requantized(group):
            return self.quantized.requantized(group, compute, self.plan.rows)
        return Change(infos, compute)

    def _resizes(self, name: str) -> bool:
        """Whether a tensor gets the shape of an adapter's, which has more tokens or is to be taken as it is."""
        return self._is_resized and any(name in adapter.whole for adapter in self.adapters)

    def _old_info(self, key: str, group: Group) -> TensorInfo:
        """Returns dtype and shape of a tensor of the files before the merge, dequantized."""
        if key in self.quantized:
            return self.quantized.info(key)
        if key in self.source.tensors:
            return self.source.tensors[key]
        origin = self._own.get(key)
        if origin is not None and origin in self.placements:
            return self._old_info(self.placements.group(origin).keys[0], group)
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
        info = self._old_info(key, Group((key,), (key,)))
        return torch.zeros(info.shape, dtype=info.dtype)

    def _compute(
        self, group: Group, modules: Sequence[ModuleMerge], dtypes: Mapping[str, torch.dtype]
    ) -> Callable[[], Mapping[str, Tensor]]:
        def compute() -> Mapping[str, Tensor]:
            old = {key: self._read(key) for key in group.keys}
            before = {key: (tensor.shape, sample(tensor).clone()) for key, tensor in old.items()}
            values = _assembled(group, old)
            for module in modules:
                values.update(module.merged({name: values[name] for name in module.names}, dtypes))
            new = _split(group, {name: value.to(dtypes[name]) for name, value in values.items()})
            for key, tensor in new.items():
                self.plan.rows[key] = self._row(key, *before[key], tensor, modules)
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


def _assembled(group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if group.is_plain:
        return {name: tensors[key] for key, name in zip(group.keys, group.names, strict=True)}
    return group.assemble(tensors.__getitem__)


def _split(group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if group.is_plain:
        return {key: tensors[name] for key, name in zip(group.keys, group.names, strict=True)}
    return group.split(tensors)


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
