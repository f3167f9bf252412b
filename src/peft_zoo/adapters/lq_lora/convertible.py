"""Checks whether a model with an LQ-LoRA adapter can become a standalone quantized model, before it is changed."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from transformers import PreTrainedModel

from peft_zoo.adapters.lq_lora.layer import LqLinear
from peft_zoo.adapters.lq_lora.model import LqLoraModel
from peft_zoo.adapters.lq_lora.ties import tying_configs

METHOD = "nfk"
"""Name of the quantization method in the `config.json` of a standalone model."""


def check_standalone(model: PeftModel, adapter_name: str | None) -> tuple[Any, str]:
    """Returns the base model and the adapter's name if the model can be converted; arguments and errors as above."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, LqLoraModel):
        raise ValueError(f"model is a {type(model).__name__} without LQ-LoRA; make one with LqLoraConfig.")
    names = model.active_adapters if adapter_name is None else [adapter_name]
    if len(names) != 1 or names[0] not in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r}: give one of {', '.join(map(repr, model.peft_config))}.")
    base, name = tuner.model, names[0]
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"the base is a {type(base).__name__}; use a `PreTrainedModel` of transformers.")
    other = getattr(base, "quantization_method", None)
    if other not in (None, METHOD):
        raise ValueError(
            f"the base is also quantized with {other!r}, and config.json holds one method; load it without."
        )
    tied: dict[str, str] = getattr(base, "all_tied_weights_keys", None) or {}
    if not any(isinstance(module, LqLinear) for module in base.modules()):
        raise ValueError("the adapter has no quantized layer; save the model merged instead.")
    for key, module in base.named_modules():
        if isinstance(module, LqLinear):
            module.quantized.verify_checksum()
        if (fault := _fault(key, module, name, {*tied, *tied.values()})) is not None:
            raise ValueError(f"{key}: {fault}")
    own_tying_configs(base)
    return base, name


def own_tying_configs(base: PreTrainedModel) -> list[Any]:
    """Returns the configurations that tie a quantized layer, whose weight the model itself does not tie."""
    layers = {key for key, module in base.named_modules() if isinstance(module, LqLinear)}
    tied: dict[str, str] = getattr(base, "all_tied_weights_keys", None) or {}
    shared = {*tied, *tied.values()}
    return tying_configs(base, layers, lambda weight: weight not in shared)


def _fault(key: str, module: Any, name: str, tied: set[str]) -> str | None:
    """Returns why a module cannot become part of a standalone model, and the fix; None if it can."""
    if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return None
    inside = {"original_module", "modules_to_save"} & set(key.split("."))
    if inside or not isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
        return "peft's trained copy cannot replace the module; leave it out of the adapter's configuration."
    has_adapter = name in (module.modules_to_save if isinstance(module, ModulesToSaveWrapper) else _adapters(module))
    if (has_adapter or isinstance(module, LqLinear)) and any(weight.startswith(f"{key}.") for weight in tied):
        return "its weight is tied to another, which the adapter does not change; leave it out of the target modules."
    if isinstance(module, ModulesToSaveWrapper):
        return None
    merged = list(module.merged_adapters)
    if isinstance(module, LqLinear):
        if not has_adapter and not module.quantized.keep_init:
            return f"the adapter {name!r} does not target it, and with keep_init=False its low-rank part is missing."
        if merged:
            return "it is merged; call `model.unmerge_adapter()` first."
        special = has_adapter and (module.lora_bias[name] or name in module.lora_variant)
        return "the standalone form has no lora_bias and no variants of LoRA; train without." if special else None
    if merged != [name] * has_adapter:
        return (
            f"it is not quantized, so {name!r} has to be merged into its weight: call `.merge()` of this layer first."
        )
    return None


def _adapters(layer: Any) -> set[str]:
    """Returns the names of the adapters in a layer."""
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part)}
