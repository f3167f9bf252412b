"""Standalone quantized models: folders that transformers loads without the base model, once `peft_zoo` is imported.

`standalone` converts a model with an LQ-LoRA adapter. A target layer becomes Q, in packed bits, plus a low-rank part::

    y = x (Q + B A)^T + b

`save_pretrained` and `from_pretrained` are those of transformers, which finds the classes of this file under the name
"nfk". Without this package transformers only logs that it does not know the name, and would fill the layers with random
values; so every quantized layer has one more tensor in the file, under the name of the weight and of another shape, on
which loading fails. Further adapters, of `LqLoraConfig` or peft's own methods, are trained on it as on any model.

Source: LQ-LoRA (arXiv 2311.12023), whose released code saves such a model as a pickle.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from yaml import YAMLError

from peft_zoo.adapters.base.card import add_to_card
from peft_zoo.adapters.lq_lora.config import nf_config
from peft_zoo.adapters.lq_lora.convertible import METHOD, check_standalone, own_tying_configs
from peft_zoo.adapters.lq_lora.layer import LqLinear
from peft_zoo.adapters.lq_lora.nf_linear import NFLinear, empty_nf_linear
from peft_zoo.adapters.lq_lora.peft_backend import dequantize_model, quantized_layers
from peft_zoo.adapters.lq_lora.stored import StoredNormalFloat
from peft_zoo.common.checks import require
from peft_zoo.io import TensorFile, TensorInfo

_log = logging.getLogger(__name__)

LOADING = """Its linear layers are quantized by LQ-LoRA, and need [peft-zoo](https://pypi.org/project/peft-zoo)
(`pip install peft-zoo`). Without the first line loading fails with mismatched shapes, as it must: transformers alone
does not know the format.

```python
import peft_zoo
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path or Hub id of this folder")
```"""

GUARD = "weight"
"""Name in a quantized layer of the tensor that no other loader can load."""


@dataclass(kw_only=True)
class NFkConfig(QuantizationConfigMixin):
    """Quantization config of each module of a standalone model; `standalone` writes it.

    Attributes:
        modules: The five values of an `NFConfig` by module name.
        ranks: Rank of the low-rank part by module name; modules that are missing have none.
        quant_method: Always "nfk".
    """

    modules: dict[str, list[Any]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    quant_method: str = METHOD  # type: ignore[assignment]

    #: How tools that work on files read the matrices, see `peft_zoo.io.stored_format`.
    stored_format: ClassVar[type[StoredNormalFloat]] = StoredNormalFloat

    def __post_init__(self) -> None:
        require(self.quant_method == METHOD, self, "quant_method", f"it is always {METHOD!r}")
        valid = isinstance(self.modules, dict) and len(self.modules) > 0
        require(valid, self, "modules", "use a dict from module name to five values")
        self.modules = {name: self._listed(name, value) for name, value in self.modules.items()}
        require(isinstance(self.ranks, dict), self, "ranks", "use a dict from module name to rank")
        for name, rank in self.ranks.items():
            if name not in self.modules:
                raise ValueError(f"NFkConfig: ranks names {name!r}, which modules lacks; leave it out.")
            if type(rank) is not int or rank < 0:
                raise ValueError(f"NFkConfig: ranks[{name!r}]={rank!r} cannot be used; use an integer from 0.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Returns the config of the fields in a `config.json`, which may be an untrusted file."""
        unknown = sorted(set(map(str, config_dict)) - {item.name for item in fields(cls)})
        if unknown:
            raise ValueError(
                f"NFkConfig: quantization_config has the unknown field {unknown[0]!r}; remove it, or update peft-zoo."
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def _listed(self, name: str, value: Any) -> list[Any]:
        try:
            return list(nf_config(value))
        except ValueError as error:
            raise ValueError(f"NFkConfig: modules[{name!r}]: {error}") from error


class NFkHfQuantizer(HfQuantizer):
    """Loads and saves standalone models for transformers; refuses to quantize a floating-point model."""

    quantization_config: NFkConfig

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config=NFkConfig(...) quantizes nothing: load the model in floating-point, quantize it "
                "with `get_peft_model(model, LqLoraConfig(...))`, and convert it with `peft_zoo.lq_lora.standalone`."
            )
        self._expected: dict[str, Tensor] = {}  # tensors that files have to fill, by name in the model

    # ---- loading ----

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Replaces the layers of the config by empty quantized ones; replaces none if the model lacks one."""
        check_weights(kwargs.get("checkpoint_files") or (), self.quantization_config)
        modules = dict(model.named_modules())
        layers: dict[str, NFLinear] = {}
        for name, listed in self.quantization_config.modules.items():
            own = next((key for key in _keys(model, name) if type(modules.get(key)) in (nn.Linear, Conv1D)), None)
            if own is None:
                found = type(modules[name]).__name__ if name in modules else "missing"
                raise ValueError(
                    f"modules[{name!r}] of the quantization_config: a {type(model).__name__} needs a linear layer of "
                    f"that name, which is {found}; load the folder as the class that it was saved from."
                )
            rank = self.quantization_config.ranks.get(name, 0)
            layers[own] = empty_nf_linear(modules[own], nf_config(listed), rank > 0, rank, use_initial=True)
        for name, layer in layers.items():
            layer._is_hf_initialized = True  # type: ignore[assignment]  # no random values where a file is incomplete
            model.set_submodule(name, layer)
            self._expected.update((f"{name}.{part}", tensor) for part, tensor in layer.saved_tensors())
        guards = rf"^({model.base_model_prefix}\.)?({'|'.join(_pattern(model, name) for name in layers)})\.{GUARD}$"
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), guards}

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """Returns the dtype that a tensor is cast to; None for tensors of quantized layers, which keep theirs."""
        if any(name in self._expected for name in converter.target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor belongs to a quantized layer, so that transformers does not check its shape."""
        return param_name in self._expected

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Refuses tensors that are missing or do not fit the configuration."""
        for name, empty in self._expected.items():
            found = model.get_buffer(name)
            if found.is_meta:
                continue  # offloaded to disk
            if not getattr(found, "_is_hf_initialized", False):
                raise ValueError(f"{name} is missing: the folder is incomplete; save the model again.")
            if (found.dtype, found.shape) != (empty.dtype, empty.shape):
                raise ValueError(
                    f"{name} is {found.dtype} of shape {tuple(found.shape)}, and quantization_config needs "
                    f"{empty.dtype} of shape {tuple(empty.shape)}; config.json and the weights do not belong together."
                )
            if found.is_floating_point() and not found.isfinite().all():
                raise ValueError(f"{name} has values that are not finite; save the model again.")
        self._expected = {}

    # ---- saving and training ----

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Returns the model's tensors with the guards, after updating the configuration to the model's layers.

        Merging an adapter may have replaced quantized layers by floating-point ones.
        """
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            return None, {}
        layers = quantized_layers(model)
        if not layers:
            self.remove_quantization_config(model)
            return None, {}
        model.config.quantization_config = self.quantization_config = _config(layers)
        return {**model.state_dict(), **_guards(model, layers)}, {"needs": "peft_zoo"}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Implements `model.dequantize()` of transformers, which passes a name once the model has been saved."""
        return dequantize_model(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def is_serializable(self) -> bool:
        """Returns True."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained."""
        return True


def _keys(model: PreTrainedModel, name: str) -> list[str]:
    """Returns the names that a module can have: a model with a head has a prefix that one without lacks."""
    prefix = f"{model.base_model_prefix}."
    return [name, prefix + name, name.removeprefix(prefix)]


def _pattern(model: PreTrainedModel, name: str) -> str:
    """Returns the regular expression of a module's name, without the prefix that a model without a head lacks."""
    return re.escape(name.removeprefix(f"{model.base_model_prefix}."))


def check_weights(files: Iterable[str], config: NFkConfig) -> None:
    """Raises a ValueError for a weights file that is invalid, or has tensors that transformers would ignore or cast."""
    with_factors: list[str] = []
    for path in files:
        if not str(path).endswith(".safetensors"):
            continue
        with TensorFile(path) as file:
            for key, info in file.tensors.items():
                part = key.rpartition(".")[2]
                with_factors += [key] if part == NFLinear.INITIAL[0] else []
                is_guard = info == TensorInfo.of(guard())
                if part == "weight" and not info.dtype.is_floating_point and not is_guard:
                    raise ValueError(f"{key} has dtype {info.dtype}; a weight has floating-point values: save again.")
    listed = sum(rank > 0 for rank in config.ranks.values())
    if len(with_factors) > listed:  # counted: transformers may rename modules while it loads them
        raise ValueError(
            f"NFkConfig: ranks lists {listed} layers, and the files have factors of {len(with_factors)}, the last "
            f"{with_factors[-1]}; save the model again."
        )


def complete_card(path: Path) -> None:
    """Adds to the model card of a folder, which may be missing, what it takes to load the model."""
    try:
        add_to_card(path, [LOADING], heading="## How to load this quantized model", tag="zoo_lq_lora")
    except (ValueError, YAMLError) as error:
        _log.warning("%s stays as it is, without a section on loading: it cannot be read (%s).", path.name, error)


def guard() -> Tensor:
    """Returns a tensor that is loaded by no linear layer, whose weight has two dimensions."""
    return torch.zeros(1, dtype=torch.uint8)


def _guards(model: PreTrainedModel, layers: Iterable[str]) -> dict[str, Tensor]:
    """Returns the guard of every layer, except where transformers converts weights while it saves."""
    rules = getattr(model, "_weight_conversions", None)
    rules = get_model_conversion_mapping(model) if rules is None else rules
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    converted = tuple(pattern.replace("\\.", ".") for rule in converters for pattern in rule.target_patterns)
    names = [f"{name}.{GUARD}" for name in layers]
    guards = {name: guard() for name in names if not any(part in name for part in converted)}
    if not guards:
        raise ValueError(
            f"{names[0]}: transformers converts the weights of all quantized layers while it saves them, so the folder "
            "could not refuse programs without peft_zoo; target a further layer that is not converted, such as o_proj."
        )
    return guards


def _config(layers: dict[str, NFLinear]) -> NFkConfig:
    ranks = {name: len(layer.initial[1]) for name, layer in layers.items() if layer.initial is not None}
    return NFkConfig(modules={name: list(layer.config) for name, layer in layers.items()}, ranks=ranks)


# ---- from a model with an adapter ----


def standalone(model: PeftModel, adapter_name: str | None = None) -> PreTrainedModel:
    """Converts a model with an LQ-LoRA adapter into a quantized model that is saved and loaded without its base.

    The given model must not be used afterwards: layers of its base are replaced, tensors are shared, and other adapters
    are lost. A quantized layer that the adapter does not target keeps its initial factors (`keep_init`), if any.

    Args:
        model: Model with an LQ-LoRA adapter, not merged.
        adapter_name: Name of the adapter; the active one by default.

    Returns:
        The base model with quantized layers that include the adapter's factors, without peft.

    Raises:
        ValueError: If the model is of another kind, or the standalone form cannot hold it; it is unchanged then.

    Examples:
        >>> import tempfile
        >>> from peft import get_peft_model
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from peft_zoo import LqLoraConfig
        >>> base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16))
        >>> model = standalone(get_peft_model(base, LqLoraConfig(r=4, target_modules=["c_attn"])))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     loaded = GPT2LMHeadModel.from_pretrained(folder)
        >>> type(loaded.transformer.h[0].attn.c_attn).__name__
        'NFLinear'
    """
    base, name = check_standalone(model, adapter_name)
    modules: dict[str, Any] = dict(base.named_modules())
    for config in own_tying_configs(base):
        config.tie_word_embeddings = False
    for key, module in modules.items():
        if isinstance(module, LqLinear):
            base.set_submodule(key, standalone_layer(module, name))
        elif isinstance(module, BaseTunerLayer):
            base.set_submodule(key, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            has_own = name in module.modules_to_save
            base.set_submodule(key, module.modules_to_save[name] if has_own else module.original_module)
    if hasattr(base, "peft_config"):
        del base.peft_config  # as peft does when it unloads
    quantizer: Any = NFkHfQuantizer(_config(quantized_layers(base)))
    base.is_quantized, base.quantization_method, base.hf_quantizer = True, METHOD, quantizer  # as after loading
    quantizer.postprocess_model(base)
    return base


def standalone_layer(layer: LqLinear, adapter_name: str) -> NFLinear:
    """Returns the quantized layer with the factors of an adapter, or its initial factors if it is not targeted."""
    targeted = adapter_name in layer.lora_A
    factors = layer.factors(adapter_name) if targeted else layer.quantized.initial
    if factors is not None and len(factors[1]) == 0:
        factors = None
    return layer.quantized.with_initial(factors, use_initial=True)


def _register() -> None:
    """Registers the classes in transformers; a reload replaces them, and another package's stay, with a warning."""
    owner = auto.AUTO_QUANTIZER_MAPPING.get(METHOD)
    if owner is not None and (owner.__module__, owner.__name__) != (__name__, NFkHfQuantizer.__name__):
        warnings.warn(
            f"{METHOD!r} already belongs to {owner.__module__}.{owner.__qualname__}; uninstall one of the two.",
            stacklevel=2,
        )
        return
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
    auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    auto.register_quantization_config(METHOD)(NFkConfig)
    auto.register_quantizer(METHOD)(NFkHfQuantizer)


_register()
