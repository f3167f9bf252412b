"""Puts the LoRAs that a recipe names onto a denoiser, and takes them away again."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn


def adapters_on(model: nn.Module) -> list[str]:
    """Names of the LoRAs on a model, in the order in which they came."""
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return list(dict.fromkeys(name for layer in layers for name in layer.scaling))


def load_adapters(model: nn.Module, adapters: Mapping[str, str | None]) -> None:
    """Loads LoRAs, for inference: folders and repositories of peft, and files in diffusers' format.

    Args:
        model: The denoiser; changed in place.
        adapters: Path or Hub id by name; None where the LoRA is there already.

    Raises:
        ValueError: If a name is taken, or what is found is no LoRA.
    """
    wanted = {name: source for name, source in adapters.items() if source is not None}
    taken = [name for name in adapters_on(model) if name in wanted]
    if taken:
        raise ValueError(f"adapters {taken} are on {type(model).__name__} already: give None as their id.")
    is_peft = {name: _is_peft(name, source) for name, source in wanted.items()}
    first: PeftModel | None = None
    with warnings.catch_warnings():
        # What is meant here: one model with several adapters.
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute in the model")
        for name, source in wanted.items():
            if not is_peft[name]:
                _load_diffusers(model, name, source)
            elif first is None:
                first = PeftModel.from_pretrained(model, source, adapter_name=name)
            else:
                first.load_adapter(source, adapter_name=name)
    if wanted:
        model.eval()  # new layers are in training mode, and may have dropout


def remove_adapters(model: nn.Module, keep: Collection[str]) -> None:
    """Takes every LoRA away but those that are named; a layer that has none left is the plain one again."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for path, layer in layers:
        if not set(layer.scaling) & set(keep):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
            continue
        layer._active_adapter = [name for name in layer.active_adapters if name in keep]
        for name in set(layer.scaling) - set(keep):
            layer.delete_adapter(name)
    configs = vars(model).get("peft_config")
    if configs is not None and not keep:
        del model.peft_config
    elif configs is not None:
        for name in set(configs) - set(keep):
            del configs[name]


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Leaves a model as it was if what is done to it fails."""
    before, training = adapters_on(model), model.training
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        remove_adapters(model, before)
        model.train(training)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        raise


def _is_peft(name: str, source: str) -> bool:
    """Whether a path or id has a configuration of peft.

    Raises:
        ValueError: If that is of another kind of adapter.
    """
    try:
        config = PeftConfig.from_pretrained(source)
    except ValueError:  # there is none: a file in another format, or nothing at all, which its loader will say
        return False
    if not isinstance(config, LoraConfig):
        raise ValueError(f"adapters[{name!r}]={source!r} is a {type(config).__name__}: a recipe is made of LoRAs.")
    return True


def _load_diffusers(model: nn.Module, name: str, source: str) -> None:
    """Loads a LoRA in diffusers' format, of whose parts only that of the denoiser counts."""
    loader: Any = getattr(model, "load_lora_adapter", None)
    if loader is None:
        raise ValueError(
            f"adapters[{name!r}]={source!r} has no adapter_config.json, and {type(model).__name__} loads nothing else."
        )
    prefix = "unet" if hasattr(model, "up_blocks") else "transformer"
    loader(source, prefix=prefix, adapter_name=name)
    if name not in adapters_on(model):
        raise ValueError(
            f"adapters[{name!r}]={source!r} has nothing for {type(model).__name__}: load it with "
            "pipe.load_lora_weights(), which converts more formats, and compose() by name."
        )


__all__: list[str] = []
