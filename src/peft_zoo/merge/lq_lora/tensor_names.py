"""Which tensor of a model in files is which of the model's: transformers renames some as it loads them.

A folder has the names that a model had when it was first published, and transformers has a list of patterns that lead
to those of today. It changes some tensors too: it splits, joins or turns them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

__all__ = ["Names"]


class Names:
    """The tensors of a folder by the names that they have in the model.

    Args:
        folder: For messages.
        model: Without values.
        keys: The names in the files.
    """

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
            else:  # `name` is the first of those that it becomes
                first, *_ = rule.target_patterns
                self._changed.update((name.replace(first, other), key) for other in rule.target_patterns)

    def _loaded(self, key: str, known: dict[str, bool]) -> tuple[str, WeightConverter | None]:
        """What transformers makes of a name in a file, and the rule by which it changes the tensor."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, known)
        if name not in known and key in known:
            return key, None
        return name, next((rule for rule in self._converters if pattern in rule.source_patterns), None)

    def key(self, name: str) -> str:
        """The name in the files of a tensor of the model.

        Raises:
            ValueError: If there is none, or the tensor in the files is another.
        """
        if name in self._keys:
            return self._keys[name]
        if name in self._changed:
            raise ValueError(
                f"{self._folder}: {self._changed[name]} becomes {name} of the model, and transformers changes such a "
                "tensor as it loads it; quantize the model in memory and use `standalone`, or do not target it."
            )
        raise ValueError(f"{self._folder}: has no {name}; its files and config.json do not belong together.")

    def beside(self, name: str, part: str) -> str:
        """The name for the files of a tensor that comes into the place of one of the model's.

        Args:
            name: The model's, as in `key`.
            part: What the last part of the name is.

        Raises:
            ValueError: If transformers would take it for something else.
        """
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
