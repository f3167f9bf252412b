"""The configuration that every method shares."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import ModelCard
from peft import PeftConfig
from peft.utils.other import get_pattern_key

from peft_zoo import registration


def option(default: Any, help_text: str) -> Any:
    """A dataclass field with a default (a factory if it is a type) and its help text."""
    kind = {"default_factory": default} if isinstance(default, type) else {"default": default}
    return field(**kind, metadata={"help": help_text})


@dataclass
class ZooConfig(PeftConfig):
    """Fields and checks that every method shares; a method adds its own fields and its own `check`.

    Raises:
        ValueError: For every field with a value that cannot work, naming the field, the value and the fix.
    """

    #: Short lower-case name; `ZOO_<NAME>` is the registered type and `zoo_<name>_` the prefix of every parameter.
    method_name: ClassVar[str]
    #: Fields that give per-module values, and the field whose value they replace.
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r"}
    #: Arguments with which a new adapter leaves the output exactly as it was; empty where the defaults do.
    identity: ClassVar[dict[str, Any]] = {}
    #: Where to start looking for AdamW's learning rate; None where LoRA's usual ones do.
    suggested_learning_rate: ClassVar[float | None] = None

    r: int = option(8, "Rank, at least 1.")
    target_modules: list[str] | str | None = option(
        None, "Modules to adapt: names or suffixes, a regular expression, 'all-linear', or None for peft's choice."
    )
    exclude_modules: list[str] | str | None = option(None, "Names or a regular expression of modules to leave alone.")
    target_parameters: list[str] | None = option(
        None, "Names of nn.Parameters to adapt directly, such as the fused experts of a mixture-of-experts layer."
    )
    modules_to_save: list[str] | None = option(
        None, "Modules to train fully and save with the adapter, such as a head."
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = option(
        None, "Rows of the embedding to train and to save with the adapter."
    )
    layers_to_transform: list[int] | int | None = option(None, "Indices of the layers to adapt; 0 is a valid index.")
    layers_pattern: list[str] | str | None = option(None, "Name of the list of layers, where it is not the usual one.")
    rank_pattern: dict[str, int] = option(dict, "Ranks for modules whose name matches the key.")
    bias: str = option("none", "Which biases to train: none, all, or zoo_<method>_only for those of adapted layers.")
    fan_in_fan_out: bool = option(False, "For compatibility; a weight's orientation is read off the layer's type.")
    init_weights: bool | str = option(True, "True: the method's initialization; False: a random, non-zero update.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = registration.peft_type_of(type(self))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        self._check_shared()
        self.check()

    def check(self) -> None:
        """Validate the method's own fields; the place for a subclass's `ValueError`s."""

    @property
    def dropout(self) -> float:
        """Probability of dropping an input element of the update: field `<method>_dropout`, if the method has one."""
        return getattr(self, f"{self.method_name}_dropout", 0.0)

    @property
    def drop_path(self) -> float:
        """Probability of dropping a sample's whole update: the field `<method>_drop_path`, if the method has one."""
        return getattr(self, f"{self.method_name}_drop_path", 0.0)

    def require(self, condition: bool, name: str, fix: str) -> None:
        """Raise a ValueError that names field `name`, its value and the fix, unless `condition` holds."""
        if not condition:
            raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r} cannot be used; {fix}.")

    def for_module(self, module_name: str) -> ZooConfig:
        """The configuration as it applies to one module: patterns that match its name are filled in and checked."""
        changes = {}
        for pattern_name, target in self.patterns.items():
            pattern = getattr(self, pattern_name)
            key = get_pattern_key(list(pattern), module_name)
            if key in pattern:
                changes[target] = pattern[key]
        if not changes:
            return self
        resolved = copy.copy(self)
        vars(resolved).update(changes)
        resolved._check_shared()
        resolved.check()
        return resolved

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as peft does, then add the tag and a way to load to the model card that peft has written there."""
        super().save_pretrained(save_directory, **kwargs)
        complete_model_card(Path(save_directory) / "README.md", f"{registration.NAMESPACE.lower()}{self.method_name}")

    def _check_shared(self) -> None:
        self.require(type(self.r) is int and self.r > 0, "r", "use an integer of at least 1")
        biases = ("none", "all", f"zoo_{self.method_name}_only")
        self.require(self.bias in biases, "bias", f"use one of {', '.join(map(repr, biases))}")
        self.require(not isinstance(self.target_parameters, str), "target_parameters", "use a list of parameter names")
        by_layer = self.layers_to_transform is not None or self.layers_pattern is not None
        self.require(
            not (isinstance(self.target_modules, str) and by_layer),
            "target_modules",
            "with `layers_to_transform` or `layers_pattern` use a list of names: peft would ignore the layers",
        )
        self.require(
            not self.layers_pattern or self.layers_to_transform is not None,
            "layers_pattern",
            "also set `layers_to_transform` to the indices to adapt",
        )
        for pattern_name in self.patterns:
            self.require(
                isinstance(getattr(self, pattern_name), dict), pattern_name, "use a dict from module name to value"
            )


HEADING = "## How to load this adapter"


def complete_model_card(path: Path, tag: str) -> None:
    """Add the method's tag and a working snippet to a model card; a card that has them already stays as it is.

    Args:
        path: The card. Nothing happens if there is none.
        tag: Tag to add to the metadata, such as `zoo_snell`.
    """
    if not path.exists():
        return
    card = ModelCard.load(path)
    tags = list(card.data.tags or [])
    if tag in tags and HEADING in card.text:
        return
    card.data.tags = tags + [new for new in ("peft-zoo", tag) if new not in tags]
    if HEADING not in card.text:
        card.text = card.text.rstrip() + f"\n\n{HEADING}\n\n{LOADING}"  # no newline: peft would take it away again
    card.save(path)


LOADING = """This adapter needs [peft-zoo](https://pypi.org/project/peft-zoo) (`pip install peft-zoo`):

```python
import peft_zoo  # registers the adapter type
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path or Hub id of this adapter")
```"""
