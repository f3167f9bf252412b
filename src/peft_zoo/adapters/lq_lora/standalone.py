"""A quantized model without its base: a folder that transformers loads once `peft_zoo` is imported.

`standalone` makes such a model of one with an LQ-LoRA adapter. What was a layer of the base is Q in its packed bits and
a part of low rank that stands beside it::

    y = x (Q + B A)^T + b

`save_pretrained` and `from_pretrained` are those of transformers, which finds the classes here under the name "nfk". A
further adapter, `LqLoraConfig` or peft's own, is trained on it as on any model.

Source: LQ-LoRA (arXiv 2311.12023), whose released code keeps such a model in a pickle.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from peft_zoo.adapters.lq_lora.config import nf_config
from peft_zoo.adapters.lq_lora.layer import LqLinear
from peft_zoo.adapters.lq_lora.model import LqLoraModel
from peft_zoo.adapters.lq_lora.nf_config import METHOD, NFkConfig
from peft_zoo.adapters.lq_lora.nf_linear import NFLinear, empty_nf_linear
from peft_zoo.adapters.lq_lora.peft_backend import floating

__all__ = ["NFkHfQuantizer", "standalone"]


class NFkHfQuantizer(HfQuantizer):
    """What transformers asks while it loads a model of the standalone form.

    Args:
        quantization_config: An `NFkConfig`.
        kwargs: As transformers gives them.

    Raises:
        ValueError: If a model in floating-point is to be quantized.
    """

    quantization_config: NFkConfig

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config=NFkConfig(...) quantizes nothing: load the model in floating-point, quantize it "
                "with `get_peft_model(model, LqLoraConfig(...))`, and make it standalone with `peft_zoo.standalone`."
            )
        self._awaited: dict[str, Tensor] = {}  # the empty tensors by the names that they have in the model

    # ---- loading ----

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Put empty layers in the places of the named ones, none if one of them is missing."""
        modules = dict(model.named_modules())
        layers: dict[str, NFLinear] = {}
        for name, way in self.quantization_config.modules.items():
            own = next((key for key in _keys(model, name) if type(modules.get(key)) in (nn.Linear, Conv1D)), None)
            if own is None:
                found = type(modules[name]).__name__ if name in modules else "not there"
                raise ValueError(
                    f"modules[{name!r}] of the quantization_config: a {type(model).__name__} needs a linear layer of "
                    f"that name, which is {found}; load the folder as the class that it was saved from."
                )
            rank = self.quantization_config.ranks.get(name, 0)
            layers[own] = empty_nf_linear(modules[own], nf_config(way), rank > 0, rank, standing=True)
        for name, layer in layers.items():
            layer._is_hf_initialized = True  # type: ignore[assignment]  # no random values where a file is incomplete
            model.set_submodule(name, layer)
            self._awaited.update((f"{name}.{part}", tensor) for part, tensor in layer.saved())

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """The dtype that a tensor is cast to; none for ours, whatever the model is loaded in."""
        if any(name in self._awaited for name in converter.target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether it is one of ours: then transformers leaves checking its shape to us."""
        return param_name in self._awaited

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Refuse tensors that are missing or not those that the configuration speaks of."""
        for name, empty in self._awaited.items():
            found = model.get_buffer(name)
            if found.is_meta:
                continue  # offloaded to disk
            if not getattr(found, "_is_hf_initialized", False):
                raise ValueError(f"{name} is missing: the folder is not complete; save the model again.")
            if (found.dtype, found.shape) != (empty.dtype, empty.shape):
                raise ValueError(
                    f"{name} is {found.dtype} of shape {tuple(found.shape)}, and quantization_config needs "
                    f"{empty.dtype} of shape {tuple(empty.shape)}; config.json and the weights do not belong together."
                )
        self._awaited = {}

    # ---- saving and training ----

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Nothing that transformers would not find; the configuration is made that of the model as it is now.

        An adapter may have been merged since, and its layers may be in floating-point.
        """
        if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            layers = _layers(model)
            if layers:
                model.config.quantization_config = self.quantization_config = _config(layers)
            else:
                self.remove_quantization_config(model)
        return None, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """What transformers' `model.dequantize()` asks for."""
        return floating(model, dtype)

    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes, with an adapter."""
        return True


def _keys(model: PreTrainedModel, name: str) -> list[str]:
    """What a module may be called: a model with a head has one part more in its names than one without."""
    prefix = f"{model.base_model_prefix}."
    return [name, prefix + name, name.removeprefix(prefix)]


def _layers(model: nn.Module) -> dict[str, NFLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NFLinear)}


def _config(layers: dict[str, NFLinear]) -> NFkConfig:
    ranks = {name: len(layer.initial[1]) for name, layer in layers.items() if layer.initial is not None}
    return NFkConfig(modules={name: list(layer.config) for name, layer in layers.items()}, ranks=ranks)


# ---- from a model with an adapter ----


def standalone(model: PeftModel, adapter_name: str | None = None) -> PreTrainedModel:
    """The base model with its matrices quantized and an adapter standing beside them, to be saved and loaded alone.

    The model that is given is used up: the layers of its base are replaced, tensors are shared, and other adapters are
    lost. Where the adapter does not reach, what a matrix has of initial factors (`keep_init`) stands beside it.

    Args:
        model: With an LQ-LoRA adapter, not merged.
        adapter_name: Which; by default the active one.

    Returns:
        The base model, without peft.

    Raises:
        ValueError: If it is another model, or has what the standalone form cannot hold: nothing is changed then.
    """
    base, name = check_standalone(model, adapter_name)
    modules: dict[str, Any] = dict(base.named_modules())
    for key, module in modules.items():
        if isinstance(module, LqLinear):
            base.set_submodule(key, standing_layer(module, name))
        elif isinstance(module, BaseTunerLayer):
            base.set_submodule(key, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            has_own = name in module.modules_to_save
            base.set_submodule(key, module.modules_to_save[name] if has_own else module.original_module)
    if hasattr(base, "peft_config"):
        del base.peft_config  # as peft does when it unloads
    quantizer: Any = NFkHfQuantizer(_config(_layers(base)))
    base.is_quantized, base.quantization_method, base.hf_quantizer = True, METHOD, quantizer  # as it is when loaded
    quantizer.postprocess_model(base)
    return base


def standing_layer(layer: LqLinear, adapter_name: str) -> NFLinear:
    """The matrix of a layer with the factors of an adapter, or where it has none the initial ones."""
    here = adapter_name in layer.lora_A
    factors = layer.factors(adapter_name) if here else layer.quantized.initial
    if factors is not None and len(factors[1]) == 0:
        factors = None
    return layer.quantized.with_initial(factors, standing=True)


def check_standalone(model: PeftModel, adapter_name: str | None) -> tuple[Any, str]:
    """The base model and the name of the adapter, if both can be made standalone."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, LqLoraModel):
        raise ValueError(f"model is a {type(model).__name__} without LQ-LoRA; make one with LqLoraConfig.")
    names = model.active_adapters if adapter_name is None else [adapter_name]
    if len(names) != 1 or names[0] not in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r}: give one of {', '.join(map(repr, model.peft_config))}.")
    base, name = tuner.model, names[0]
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"the base is a {type(base).__name__}, and only models of transformers are loaded alone.")
    other = getattr(base, "quantization_method", None)
    if other not in (None, METHOD):
        raise ValueError(f"the base is quantized with {other!r} too, and config.json holds one way; load it without.")
    tied: dict[str, str] = getattr(base, "all_tied_weights_keys", None) or {}
    if not any(isinstance(module, LqLinear) for module in base.modules()):
        raise ValueError("the adapter is on no quantized matrix, and the standalone form is for such; save it merged.")
    for key, module in base.named_modules():
        if isinstance(module, LqLinear):
            module.quantized.receive()
        if (fault := _fault(key, module, name, {*tied, *tied.values()})) is not None:
            raise ValueError(f"{key}: {fault}")
    return base, name


def _fault(key: str, module: Any, name: str, tied: set[str]) -> str | None:
    """Why a module cannot become one of the standalone form; None if it can, or is none that adapters are in."""
    if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return None
    inside = {"original_module", "modules_to_save"} & set(key.split("."))
    if inside or not isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
        return "what peft trains here cannot be put back; leave it out of the adapter's configuration."
    mine = name in (module.modules_to_save if isinstance(module, ModulesToSaveWrapper) else _adapters(module))
    if (mine or isinstance(module, LqLinear)) and any(weight.startswith(f"{key}.") for weight in tied):
        return "its weight is tied to another, which is no longer the same; leave it out of the adapter's targets."
    if isinstance(module, ModulesToSaveWrapper):
        return None
    merged = list(module.merged_adapters)
    if isinstance(module, LqLinear):
        if merged:
            return "it is merged; call `model.unmerge_adapter()` first."
        special = mine and (module.lora_bias[name] or name in module.lora_variant)
        return "lora_bias and variants of LoRA have no place beside the matrix; train without." if special else None
    if merged != [name] * mine:
        return f"it is not quantized, so that {name!r} has to be in its weight: call `.merge()` of this layer first."
    return None


def _adapters(layer: Any) -> set[str]:
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part)}


def _register() -> None:
    """Make the classes known to transformers; importing this module anew replaces them, another owner keeps them."""
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
