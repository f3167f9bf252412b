"""Where the tensors of a model are in its files: transformers renames, joins, splits and permutes some while loading.

Which tensors belong together, and how they are converted, is decided by transformers' own rules for the model. All of
them move values without changing them, so that an update of the model's tensor is moved to the files the same way.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from peft_zoo.io.header import TensorInfo
from peft_zoo.io.safetensors import FLOATS

Read = Callable[[str], Tensor]


@dataclass
class Group:
    """Tensors of a model that are made of the same tensors of the files.

    Attributes:
        keys: Names in the files, in the order in which transformers joins them.
        names: Names in the model.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    _model: Any = field(repr=False, default=None)
    _rule: WeightConverter | None = field(repr=False, default=None)
    _patterns: tuple[str, ...] = field(repr=False, default=())
    _reverse_renamings: list[Any] = field(repr=False, default_factory=list)

    @property
    def is_plain(self) -> bool:
        """Whether the tensor of the model is the one of the files."""
        return self._rule is None

    def assemble(self, read: Read) -> dict[str, Tensor]:
        """Returns the tensors of the model by name."""
        if self._rule is None:
            return {self.names[0]: read(self.keys[0])}
        rule: Any = copy.deepcopy(self._rule)
        first = self.names[0]
        for key, pattern in zip(self.keys, self._patterns, strict=True):
            rule.add_tensor(first, key, pattern, read(key))
        return {name: _one(tensor) for name, tensor in rule.convert(first, self._model, self._model.config).items()}

    def split(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors of the files by key, from all tensors of `names`.

        Raises:
            ValueError: If transformers cannot convert them back.
        """
        if self._rule is None:
            return {self.keys[0]: tensors[self.names[0]]}
        try:
            rule: Any = self._rule.reverse_transform()
        except NotImplementedError:
            raise self._cannot() from None
        target = ""
        for name in sorted(self.names, key=dot_natural_key):
            renamed, pattern = apply_converters(name, [rule])
            if pattern is None:
                raise self._cannot()
            target = target or renamed
            rule.add_tensor(target, name, pattern, tensors[name])
        found = {
            apply_renamings(name, self._reverse_renamings): _one(tensor)
            for name, tensor in rule.convert(target, self._model, self._model.config).items()
        }
        for prefix in ("", f"{self._model.base_model_prefix}."):
            for change in (prefix.__add__, lambda name, prefix=prefix: name.removeprefix(prefix)):
                named = {change(name): tensor for name, tensor in found.items()}
                if named.keys() == set(self.keys):
                    return named
        raise self._cannot()

    def _cannot(self) -> ValueError:
        return ValueError(
            f"{self.names[0]}: transformers converts {self.keys[0]} while it loads the model, and cannot convert it "
            "back; leave this module out of target_modules, or merge in memory."
        )


class Placements:
    """Finds the tensors of the files by the names of those of a model.

    Args:
        model: Model without weights. One of diffusers has its tensors under their own names.
        keys: Names of the tensors in the files.
    """

    def __init__(self, model: Any, keys: Iterable[str]) -> None:
        has_rules = isinstance(model, PreTrainedModel)
        rules = get_model_conversion_mapping(model) if has_rules else []
        self._model = model
        self._prefix: str | None = model.base_model_prefix if has_rules else None
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        reverse = [
            rule.reverse_transform()
            for rule in (get_model_conversion_mapping(model, add_legacy=False)[::-1] if has_rules else [])
            if isinstance(rule, WeightRenaming)
        ]
        self._known = dict.fromkeys(model.state_dict(), True)
        groups: dict[str, Group] = {}
        for key in sorted(keys, key=dot_natural_key):
            name, pattern, rule = self._loaded(key, self._known)
            if name not in self._known:
                continue  # a tensor that the model does not have, such as those of a quantized format
            if rule is None:
                groups[name] = Group((key,), (name,))
                continue
            old = groups.get(name)
            groups[name] = Group(
                (*(old.keys if old else ()), key),
                tuple(name.replace(rule.target_patterns[0], target) for target in rule.target_patterns),
                model,
                rule,
                (*(old._patterns if old else ()), str(pattern)),
                reverse,
            )
        self.groups: list[Group] = list(groups.values())
        self._group = {name: group for group in self.groups for name in group.names}

    def _loaded(self, key: str, known: Mapping[str, bool]) -> tuple[str, str | None, WeightConverter | None]:
        """Returns the name in the model of a tensor of the files, and the pattern and rule that convert it, if any."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, dict(known))
        if name not in known and key in known:
            return key, None, None
        return name, pattern, next((rule for rule in self._converters if pattern in rule.source_patterns), None)

    def __contains__(self, name: object) -> bool:
        """Whether the files have a tensor of the model."""
        return name in self._group

    def group(self, name: str) -> Group:
        """Returns the group of a tensor of the model.

        Raises:
            ValueError: If the files have none; names the nearest ones.
        """
        if name in self._group:
            return self._group[name]
        near = difflib.get_close_matches(name, self._group, n=3) or list(self._group)[:3]
        raise ValueError(f"{name}: the base has no such tensor, the nearest are {', '.join(near)}; give its own base.")

    @property
    def absent(self) -> set[str]:
        """Names of tensors of the model that the files do not have, such as tied ones."""
        return self._known.keys() - self._group.keys()

    def key(self, name: str) -> str:
        """Returns the name in the files of a tensor of the model; one that transformers converts is refused."""
        group = self.group(name)
        if not group.is_plain:
            raise ValueError(
                f"{group.keys[0]} becomes {name} of the model, and transformers converts such a tensor while loading "
                "it; quantize the model in memory and use `standalone`, or do not target it."
            )
        return group.keys[0]

    def sibling_key(self, name: str, part: str) -> str:
        """Returns the name in the files of `part`, which replaces the model's tensor `name` in the same module."""
        wanted = f"{name.rpartition('.')[0]}.{part}"
        known = {**self._known, wanted: True}
        for stem in (self.key(name), name):
            key = f"{stem.rpartition('.')[0]}.{part}"
            found, _, rule = self._loaded(key, known)
            if found == wanted and rule is None:
                return key
        raise ValueError(
            f"transformers would not find {wanted} under any name; quantize the model in memory and use `standalone`."
        )

    def check_tensors(self, tensors: Mapping[str, TensorInfo], skipped: Collection[str] = ()) -> None:
        """Raises a ValueError for a tensor of the model that the files lack, or have in another shape.

        Args:
            tensors: Dtype and shape of the tensors in the files by key.
            skipped: Names in the model of tensors that may have other shapes and dtypes, since they are quantized.
        """
        ignored = getattr(self._model, "_keys_to_ignore_on_load_missing", None) or ()
        tied = {name for pair in (getattr(self._model, "all_tied_weights_keys", None) or {}).items() for name in pair}
        for name, tensor in self._model.state_dict().items():
            group = self._group.get(name)
            is_optional = name in tied or any(re.search(pattern, name) for pattern in ignored)
            if group is None and not is_optional:
                raise ValueError(f"{name}: the files have no such tensor; they and config.json do not belong together.")
            if group is None or not group.is_plain or name in skipped:
                continue
            found = tensors[group.keys[0]]
            if found.shape != tuple(tensor.shape):
                raise ValueError(
                    f"{group.keys[0]} is of shape {found.shape}, and config.json says {tuple(tensor.shape)}; its files "
                    "and config.json do not belong together."
                )
            if tensor.is_floating_point() and found.dtype not in FLOATS:
                raise ValueError(f"{group.keys[0]} is {found.dtype}, and no quantization_config explains it.")


def _one(tensor: Any) -> Tensor:
    """Returns the tensor; transformers returns some in a list of one."""
    found: Tensor = tensor[0] if isinstance(tensor, list) else tensor
    return found
