"""LoRA layers of a denoiser: loading and removing adapters, choosing which are active, scaling them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_zoo.adapters.base.loading import load_saved, read_config
from peft_zoo.adapters.base.source import AdapterSource
from peft_zoo.io import LoraAdapter, open_adapter

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


class AdapterLayers:
    """All LoRA layers of a denoiser; raises a ValueError if there are none, or if they cannot be composed.

    Attributes:
        ranks: Each layer with the rank of each of its adapters; equal lists mean passes of equal cost.
        names: Names of the adapters.
        factors: Factors on the scales of adapters during the passes of `activated`, by name; 1 for all others.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.layers = [module for module in denoiser.modules() if isinstance(module, LoraLayer)]
        if not self.layers:
            raise ValueError(
                f"{type(denoiser).__name__} has no LoRA: load some with pipe.load_lora_weights(..., adapter_name=...), "
                "or put their paths or Hub ids into the recipe and call get_peft_model()."
            )
        fused = sorted({name for layer in self.layers for name in layer.merged_adapters})
        if fused:
            raise ValueError(
                f"adapters {fused} are fused into the base weights: call pipe.unfuse_lora() or unmerge_adapter()."
            )
        whole = [name for name, m in denoiser.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        if whole:
            raise ValueError(f"modules_to_save={whole} cannot be composed: use adapters that only have LoRA layers.")
        self.ranks = [(layer, dict(layer.r)) for layer in self.layers]
        self.names = lora_names(denoiser)
        self.factors: Mapping[str, float] = {}
        self._before: list[tuple[LoraLayer, Any, dict[str, float]]] = []

    @property
    def enabled(self) -> bool:
        """Whether no layer is disabled (by `disable_lora` or `disable_adapter`)."""
        return not any(layer.disable_adapters for layer in self.layers)

    def with_dora(self, names: Sequence[str]) -> list[str]:
        """Returns those of `names` that are DoRA adapters, which peft cannot mix within a batch."""
        return [name for name in names if any(layer.use_dora.get(name) for layer in self.layers)]

    def norms(self, names: Sequence[str]) -> dict[str, float]:
        """Returns the Frobenius norm of each adapter's update over all layers, scale included; none may be zero."""
        found = {}
        for name in names:
            found[name] = sum(_squared_norm(layer, name) for layer in self.layers if name in layer.scaling) ** 0.5
            if not found[name]:
                raise ValueError(f"adapter {name!r} has an update of zero norm: train it, or remove it from adapters.")
        return found

    def remember(self) -> None:
        """Records the active adapters and all scales for `restore`."""
        self._before = [(layer, layer._active_adapter, dict(layer.scaling)) for layer in self.layers]

    def restore(self) -> None:
        """Restores the active adapters and scales that `remember` recorded, and clears the record."""
        for layer, active, scaling in self._before:
            layer._active_adapter = active
            layer.scaling.update({name: scale for name, scale in scaling.items() if name in layer.scaling})
        self._before = []

    def scales(self) -> list[dict[str, float]]:
        """Returns a copy of the scales of all adapters, layer by layer."""
        return [dict(layer.scaling) for layer in self.layers]

    @contextmanager
    def activated(self, names: Sequence[str], together: bool) -> Iterator[None]:
        """Activates exactly these adapters.

        `together` applies all of them to every row of the batch, otherwise each to its own equal part, in order.
        """
        for layer in self.layers:
            layer._active_adapter = list(names)  # peft's set_adapter would also make them trainable
        hook = partial(_pass_adapter_names, tuple(names))
        with self._scaled(), ExitStack() as hooks:
            for layer in () if together or len(names) == 1 else self.layers:
                hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
            yield

    @contextmanager
    def _scaled(self) -> Iterator[None]:
        """Multiplies the scales by `factors` during one pass, and restores them.

        A scale that is set between two passes (`pipe.set_adapters`) is therefore multiplied too. A call of the denoiser
        with a scale of its own is undone here: diffusers resets the scales after a scale of 0.
        """
        before = self.scales()
        for layer in self.layers:
            for name, factor in self.factors.items():
                if name in layer.scaling:
                    layer.scaling[name] *= factor
        try:
            yield
        finally:
            for layer, scales in zip(self.layers, before, strict=True):
                layer.scaling.update(scales)


def _squared_norm(layer: Any, name: str) -> float:
    """Returns the squared Frobenius norm of one adapter's update of one layer.

    For linear and convolutional layers it is trace((B'B)(AA')), two matrices of the size of the rank, summed over the
    groups of a convolution. Other layers build the update.
    """
    factors = [part[name] for part in (layer.lora_A, layer.lora_B) if name in part]
    is_product = all(isinstance(one, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) for one in factors)
    if not factors or not is_product or isinstance(layer, ParamWrapper):
        return float(layer.get_delta_weight(name).detach().double().square().sum())
    groups = getattr(factors[1], "groups", 1)
    parts = [one.weight.detach().double().flatten(1).chunk(groups) for one in factors]
    squares = (float(((up.T @ up) * (down @ down.T)).sum()) for down, up in zip(*parts, strict=True))
    return layer.scaling[name] ** 2 * max(0.0, sum(squares))  # rounding can make the sum slightly negative


def _pass_adapter_names(
    names: tuple[str, ...], _: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Pre-hook that tells a LoRA layer the adapter of each row of a mixed batch."""
    rows = len(args[0] if args else next(iter(kwargs.values()))) // len(names)
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(rows)]}


# ---- loading and removing ----


def lora_names(model: nn.Module) -> list[str]:
    """Returns the names of the LoRAs on a model, in the order in which they were added."""
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return list(dict.fromkeys(name for layer in layers for name in layer.scaling))


def load_adapters(model: nn.Module, adapters: Mapping[str, str | None]) -> None:
    """Loads LoRAs for inference from peft folders, repositories or files in diffusers' format, by adapter name.

    None stands for a LoRA that is loaded already. The model is put into evaluation mode. Raises a ValueError if a name
    is taken or a source holds no LoRA for this model.
    """
    wanted = {name: source for name, source in adapters.items() if source is not None}
    taken = [name for name in lora_names(model) if name in wanted]
    if taken:
        raise ValueError(f"adapters {taken} are on {type(model).__name__} already: give None as their path.")
    first: nn.Module = model
    with warnings.catch_warnings():
        # peft warns about several adapters on one model, which is what is wanted here.
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute in the model")
        for name, source in wanted.items():
            try:
                file = _single_file(AdapterSource(source))
                if file is not None:
                    _load_single_file(model, name, file)
                else:
                    first = _load_saved(first, name, AdapterSource(source))
            except (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(f"adapters[{name!r}]={source!r} cannot be loaded: {reason}") from error
    if wanted:
        model.eval()  # new layers are in training mode and may have dropout


def remove_adapters(model: nn.Module, keep: Collection[str]) -> None:
    """Removes all LoRAs but those in `keep`; a layer without any becomes its base layer again."""
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)]
    for path, layer in layers:
        layer._active_adapter = [name for name in layer.active_adapters if name in keep]
        for name in set(layer.scaling) - set(keep):
            layer.delete_adapter(name)
        if not layer.scaling:
            model.set_submodule(path, layer.get_base_layer())
    configs = vars(model).get("peft_config", {})
    for name in set(configs) - set(keep):
        del configs[name]
    if not keep:
        vars(model).pop("peft_config", None)


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Removes the LoRAs added inside and restores training mode and trainable flags if the block raises."""
    before, training = lora_names(model), model.training
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        remove_adapters(model, before)
        model.train(training)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        raise


def _single_file(source: AdapterSource) -> Path | None:
    """Returns the file in diffusers' format that a source is or has; None for an adapter in peft's format."""
    path = Path(source.path)
    if path.is_file():
        return path
    return None if source.file(CONFIG_NAME) is not None else source.file(DIFFUSERS_NAME)


def _load_saved(model: nn.Module, name: str, source: AdapterSource) -> PeftModel:
    """Loads a LoRA in peft's format as `peft_zoo.load_adapter` does; `model` is a `PeftModel` after the first one.

    Where its configuration has a regular expression for the names of modules, those of the file are used instead.
    """
    kind = source.config().get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type={kind!r} in {CONFIG_NAME}; give a LoRA (`LoraConfig`).")
    return load_saved(source, read_config(source, targets_of_file=True), model, name)


def _load_single_file(model: nn.Module, name: str, path: Path) -> None:
    """Loads the denoiser's part of a LoRA file in diffusers' format; raises unless every factor and scale arrives."""
    loader: Any = getattr(model, "load_lora_adapter", None)
    if loader is None:
        raise ValueError(f"there is no {CONFIG_NAME}, and {type(model).__name__} loads only folders of peft.")
    if path.name.endswith(PICKLES):
        raise ValueError("a pickle runs code when it is opened; save the LoRA with safetensors.")
    part = "unet" if hasattr(model, "up_blocks") else "transformer"
    with open_adapter(path) as adapter:
        if adapter.other_keys:
            raise ValueError(f"the tensor {adapter.other_keys[0]!r} is no part of a LoRA; remove it.")
        for module in adapter.modules:
            adapter.factors(module)  # reads and checks the values, before the model is changed
        loader(str(path), use_safetensors=True, prefix=part, adapter_name=name)
        if name not in lora_names(model):
            raise ValueError(
                f"it has no tensors for {type(model).__name__}: call pipe.load_lora_weights(), which converts more "
                "formats, and compose() by name."
            )
        layers = dict(model.named_modules())
        for module in (module for module in adapter.modules if module.startswith(f"{part}.")):
            _check_loaded(layers.get(module.removeprefix(f"{part}.")), name, adapter, module)


def _check_loaded(layer: Any, name: str, adapter: LoraAdapter, module: str) -> None:
    """Raises a ValueError unless a layer has the factors and the scale of a module in the file."""
    if not isinstance(layer, LoraLayer) or name not in layer.scaling:
        raise ValueError(f"the file has tensors of {module!r}, which is no layer of the model that can have a LoRA.")
    scale = adapter.modules[module].scale
    if not math.isclose(layer.scaling[name], scale, rel_tol=1e-6):
        raise ValueError(
            f"{module} has the scale {scale:g} in the file, and {layer.scaling[name]:g} as diffusers loads it: call "
            "pipe.load_lora_weights(), and compose() by name."
        )
    pair: Any = (layer.lora_B[name].weight, layer.lora_A[name].weight)
    for factor, weight in zip(adapter.factors(module), pair, strict=True):
        if not torch.equal(factor.reshape(weight.shape).to(weight), weight):
            raise ValueError(f"the file's factors of {module!r} are not those that diffusers loads; save it again.")
