"""Base classes of configurations: the fields, checks and method description that all methods share."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key

from peft_zoo import registration
from peft_zoo.adapters.base.card import complete_model_card
from peft_zoo.adapters.base.saving import with_exact_names
from peft_zoo.adapters.base.source import SOURCE, AdapterSource, check_literal, check_numbers
from peft_zoo.common import checks
from peft_zoo.common.atomic import replaced_file
from peft_zoo.io import LoraAdapter, TensorFile
from peft_zoo.io.digest import DIGEST, sha256_of
from peft_zoo.io.lora_settings import check_names, check_present, needed_fields

Config = TypeVar("Config", bound="MethodConfig")

#: Metadata entry of a field: whether each saved configuration has it.
IS_NEEDED = "is_needed"


def option(default: Any, help_text: str, *, is_new: bool = False) -> Any:
    """Returns a dataclass field with help text.

    Args:
        default: Default value; a callable such as `dict` is called to make a new value for each instance.
        help_text: One or two sentences for the docstring, the documentation page and `peft-zoo`.
        is_new: Whether files of earlier versions lack the field; the default is then what they mean.
    """
    kind = {"default_factory": default} if callable(default) else {"default": default}
    return field(**kind, metadata={"help": help_text, IS_NEEDED: not is_new})


@dataclass(frozen=True)
class Conformance:
    """Settings for running peft's own test-suite on a method; `tests/conformance_list.py` reads them.

    Attributes:
        arguments: Arguments of the configuration for the tiny models and large SGD steps of peft's tests.
        skips: Maps a regular expression, searched in the id of a test, to the reason for skipping that test.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    skips: Mapping[str, str] = field(default_factory=dict)


class MethodConfig:
    """Mixin for a configuration class: the attributes and checks of a method that the package uses.

    The tuner's costs and its `transformers.Trainer` callback are arguments of `registration.register`.
    """

    #: Short lower-case name; `ZOO_<NAME>` is the registered type.
    method_name: ClassVar[str]
    #: Whether the method has weights to train; False for a recipe that combines trained adapters.
    trainable: ClassVar[bool] = True
    #: Whether a saved adapter is a plain LoRA but for its type: updates `s * B A` on unchanged base weights.
    saves_plain_lora: ClassVar[bool] = False
    #: Whether diffusers can load the tensors of an adapter as a LoRA, with `as_plain_lora` as its configuration.
    loads_in_diffusers: ClassVar[bool] = False
    #: Whether a model of diffusers holds the configuration, after its own `add_adapter`; set on the tuner's copy.
    is_for_diffusers: ClassVar[bool] = False
    #: How well `export_lora` writes an adapter as a plain LoRA: "exact", "approximate", "with_base" or "no".
    exportable: ClassVar[str] = "approximate"
    #: Whether the configuration is saved before the weights, as a model of transformers with own adapters does.
    is_saved_first: ClassVar[bool] = False
    #: Arguments with which a new adapter leaves the output unchanged; empty if the defaults do.
    identity: ClassVar[dict[str, Any]] = {}
    #: Initial learning rate to try with AdamW; None if rates that suit LoRA do.
    suggested_learning_rate: ClassVar[float | None] = None
    #: How peft's own tests are run on the method.
    conformance: ClassVar[Conformance] = Conformance()

    def __post_init__(self) -> None:
        config: Any = self  # a PeftConfig too, which follows this mixin in a subclass
        super().__post_init__()  # type: ignore[misc]
        config.peft_type = registration.peft_type_of(type(config))

    def open_factors(self, file: TensorFile, fields: Mapping[str, Any], has_base: bool) -> LoraAdapter | None:
        """Returns the factors in the file of a saved adapter; None if `export_lora` has to make its layers.

        Args:
            file: The open weights file.
            fields: Content of `adapter_config.json`.
            has_base: Whether the LoRA is for a base model that was given.
        """
        return None

    def sizes_in_file(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
        """Returns the sizes `(out, in)` of a layer by the shapes of its adapter's tensors; None if they do not tell."""
        return None

    def as_plain_lora(self) -> LoraConfig:
        """Returns the same adapter as a `LoraConfig` of peft; only for methods with `loads_in_diffusers`."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by name; those of a plain LoRA if the model's own `save_lora_adapter` asks.

        Raises:
            ValueError: If diffusers asks and the adapter is no plain LoRA: it would write a file that it cannot load.
        """
        if not self.is_for_diffusers:
            return super().to_dict()  # type: ignore[misc]
        if self.loads_in_diffusers:
            return self.as_plain_lora().to_dict()
        raise ValueError(
            f"{type(self).__name__}: diffusers saves and loads plain LoRAs only, and save_lora_adapter would write a "
            "file that nothing loads; use get_peft_model(model, config) and its save_pretrained instead."
        )

    def require(self, condition: bool, name: str, fix: str) -> None:
        """Raises a ValueError that names field `name`, its value and `fix`, unless `condition` holds."""
        checks.require(condition, self, name, fix)

    def for_training(self: Config, steps: int) -> Config:
        """Returns the configuration for a training run of `steps` optimizer steps; here the object itself.

        A method with a schedule returns a copy with the number of steps filled in.

        Raises:
            ValueError: If the schedule does not fit into `steps`.
        """
        return self


@dataclass
class TrainedConfig(MethodConfig):
    """Mixin for the configuration of a method with weights: loading checks the file, saving binds it to its weights."""

    weights_sha256: str | None = option(None, "SHA-256 of the saved weights file; filled in by saving.", is_new=True)

    def __new__(cls, *args: Any, **values: Any) -> TrainedConfig:
        """Refuses the fields of a file that lacks one: they have the `peft_type`, on each way in which peft reads them.

        Raises:
            ValueError: Naming the field.
        """
        kind: Any = cls
        if "peft_type" in values and values["peft_type"] == registration.peft_type_of(kind):
            own = [item.name for item in fields(cls) if item.metadata.get(IS_NEEDED)]
            check_present(values, [*own, *(needed_fields(values) if issubclass(cls, LoraConfig) else ())])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Loads as peft does; refuses what is not valid JSON, regular expressions and numbers out of bounds.

        The weights are checked when the configuration, with `inference_mode`, gets into a model.

        Raises:
            ValueError: Naming the field, its value and the fix.
        """
        source = AdapterSource(str(pretrained_model_name_or_path), subfolder, cls._split_kwargs(kwargs)[0])  # type: ignore[attr-defined]
        found = source.config()
        check_names(found)
        check_literal(found, source.module_names)
        try:
            config: PeftConfig = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, subfolder, **kwargs
            )
        except (TypeError, AttributeError, RecursionError) as error:
            if "peft_type" not in found:
                raise  # peft's own error, which other programs may expect
            raise ValueError(f"{cls.__name__} cannot be made of the fields in the file: {error}.") from error
        vars(config)[SOURCE] = source
        return config

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields that peft saves; the checksum only if there is one."""
        found: dict[str, Any] = super().to_dict()
        return {name: value for name, value in found.items() if name != DIGEST or value is not None}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves the configuration as peft does, as a whole, with names of modules and the checksum of saved weights.

        Adds tags and loading instructions to the model card that peft has written.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        saved: Any = with_exact_names(self)  # type: ignore[arg-type]
        weights = folder / SAFETENSORS_WEIGHTS_NAME
        is_written = weights.is_file() and not self.is_saved_first  # else those of an earlier save
        saved.weights_sha256 = sha256_of(weights) if is_written else None
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as work:
            super(TrainedConfig, saved).save_pretrained(work, **kwargs)  # type: ignore[misc]
            with replaced_file(folder / CONFIG_NAME) as new:
                Path(work, CONFIG_NAME).replace(new)
        complete_model_card(folder / "README.md", f"{registration.NAMESPACE.lower()}{self.method_name}")


@dataclass
class ZooConfig(TrainedConfig, PeftConfig):
    """Fields and checks that every method shares; a method adds its own fields and its own `check`.

    Raises:
        ValueError: For each field with an invalid value, naming the field, the value and the fix.
    """

    #: Maps each field that gives per-module values to the field that it overrides.
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r"}

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
    layers_pattern: list[str] | str | None = option(None, "Name of the list of layers; None: the outermost list.")
    rank_pattern: dict[str, int] = option(dict, "Ranks for modules whose name matches the key.")
    bias: str = option("none", "Biases to train: none, all, or zoo_<method>_only for those of adapted layers.")
    fan_in_fan_out: bool = option(
        False, "Ignored, for compatibility; the orientation of a weight follows from the type of its layer."
    )
    init_weights: bool | str = option(True, "True: the method's initialization; False: a random, non-zero update.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        self._check_shared()
        self.check()

    def check(self) -> None:
        """Validates the method's own fields; a subclass raises its `ValueError`s here."""

    @property
    def dropout(self) -> float:
        """Dropout probability of the update's input: field `<method>_dropout`, or 0 without such a field."""
        return getattr(self, f"{self.method_name}_dropout", 0.0)

    @property
    def drop_path(self) -> float:
        """Probability of dropping the update of a sample: field `<method>_drop_path`, or 0 without such a field."""
        return getattr(self, f"{self.method_name}_drop_path", 0.0)

    def for_module(self, module_name: str) -> ZooConfig:
        """Returns the configuration for one module: validated values of patterns that match its name, in a copy."""
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

    def _check_shared(self) -> None:
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


def check_rank(config: object, rank: int, out_features: int, in_features: int) -> None:
    """Raises a ValueError if `rank`, of one module, is above 1024 and above both sizes of its weight."""
    most = max(1024, out_features, in_features)
    name = f"{type(config).__name__}: r"
    checks.check(rank <= most, name, rank, f"use at most {most} for a weight of {out_features} x {in_features}")
