"""Maps a model's tensors to their names in its files: transformers renames some while it loads them.

Files have the names under which a model was first published, and transformers has a list of patterns that map them to
today's. It also splits, joins or transposes some tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class TensorNames:
    """Names `keys` of the tensors in a folder's files, by the names of the tensors in the model on the meta device."""

    def __init__(self, folder: Path, model: Any, keys: Iterable[str]) -> None:
        self._folder, self._prefix = folder, model.base_model_prefix
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._known: dict[str, bool] = dict.fromkeys(model.state_dict(), True)
        self._keys: dict[str, str] = {}
        self._changed: dict[str, str] = {}
        for key in keys:
            name, rule = self._loaded(key, self._known)
            if rule is None:
                self._keys[name] = key
            else:  # `name` is the first of the names that it becomes
                first, *_ = rule.target_patterns
                self._changed.update((name.replace(first, other), key) for other in rule.target_patterns)

    @property
    def absent(self) -> set[str]:
        """Names of the tensors of the model that no file has."""
        return self._known.keys() - self._keys.keys() - self._changed.keys()

    def __contains__(self, name: object) -> bool:
        """Whether a file has a tensor that becomes `name` without being converted."""
        return name in self._keys

    def _loaded(self, key: str, known: dict[str, bool]) -> tuple[str, WeightConverter | None]:
        """Returns the name in the model of a tensor in a file, and the rule that converts the tensor, if any."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, known)
        if name not in known and key in known:
            return key, None
        return name, next((rule for rule in self._converters if pattern in rule.source_patterns), None)

    def key(self, name: str) -> str:
        """Returns the name in the files of a tensor of the model; one that transformers converts is refused."""
        if name in self._keys:
            return self._keys[name]
        if name in self._changed:
            raise ValueError(
                f"{self._folder}: {self._changed[name]} becomes {name} of the model, and transformers converts such a "
                "tensor while loading it; quantize the model in memory and use `standalone`, or do not target it."
            )
        raise ValueError(f"{self._folder}: has no {name}; its files and config.json do not belong together.")

    def sibling_key(self, name: str, part: str) -> str:
        """Returns the name in the files of `part`, which replaces the model's tensor `name` in the same module."""
        wanted = f"{name.rpartition('.')[0]}.{part}"
        known = {**self._known, wanted: True}
        for stem in (self.key(name), name):
            key = f"{stem.rpartition('.')[0]}.{part}"
            if self._loaded(key, known) == (wanted, None):
                return key
        raise ValueError(
            f"{self._folder}: transformers would not find {wanted} under any name; quantize the model in memory and "
            "use `standalone`."
        )
