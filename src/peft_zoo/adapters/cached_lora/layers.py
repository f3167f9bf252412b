"""LoRA layers of a denoiser: loading and removing adapters, choosing which are active, scaling them."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_zoo.io import open_adapter
from peft_zoo.io.strict_json import read_json

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
    first: PeftModel | None = None
    with warnings.catch_warnings():
        # peft warns about several adapters on one model, which is what is wanted here.
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute in the model")
        warnings.filterwarnings("ignore", ".*Found missing adapter keys")  # an error below
        for name, source in wanted.items():
            try:
                modules = check_lora(source) if os.path.lexists(source) else None
                first = _load_lora(model, first, name, source, modules)
                if modules is not None:
                    _check_complete(model, name, modules)
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


def check_lora(source: str) -> list[str] | None:
    """Raises a ValueError unless a folder or file holds a LoRA whose tensors are finite and fit its configuration.

    Nothing of the file is run: patterns that are expressions are refused. Returns the names of its modules, None for
    a file in diffusers' format, whose names are not those of the model.
    """
    path = Path(source)
    single = path / DIFFUSERS_NAME
    is_peft = path.is_dir() and not (os.path.lexists(single) and not os.path.lexists(path / CONFIG_NAME))
    if is_peft:
        kind = read_json(path / CONFIG_NAME, path).get("peft_type")
        if kind != "LORA":
            raise ValueError(f"peft_type={kind!r} in {CONFIG_NAME}; give a LoRA (`LoraConfig`).")
    with open_adapter(path if is_peft or path.is_file() else single) as adapter:
        if adapter.other_keys:
            raise ValueError(f"the tensor {adapter.other_keys[0]!r} is no part of a LoRA; remove it.")
        for name in adapter.modules:
            adapter.factors(name)  # reads and checks the values
        return list(adapter.modules) if is_peft else None


def _check_complete(model: nn.Module, name: str, modules: Collection[str]) -> None:
    """Raises a ValueError unless the layers of adapter `name` are exactly the modules of its file."""
    layers = {
        path for path, module in model.named_modules() if isinstance(module, LoraLayer) and name in module.scaling
    }
    if lost := sorted(layers.difference(modules)):
        raise ValueError(f"the file has no tensors of {lost[0]!r}, which target_modules names; get it again.")
    if extra := sorted(set(modules).difference(layers)):
        close = difflib.get_close_matches(extra[0], layers, n=1)
        nearest = f"; the nearest one is {close[0]!r}" if close else ""
        raise ValueError(f"the file has tensors of {extra[0]!r}, which is no target module{nearest}.")


def _load_lora(
    model: nn.Module, first: PeftModel | None, name: str, source: str, modules: Collection[str] | None
) -> PeftModel | None:
    """Loads one LoRA; takes and returns the PeftModel made by the first LoRA in peft's format, None before it.

    `modules` are the names of the modules in its file, if known: an expression in `target_modules` is not run then.
    """
    try:
        config: Any = PeftConfig.from_pretrained(source)
    except ValueError:  # no config: a file in diffusers' format, or nothing at all, which its loader reports
        _load_diffusers_lora(model, name, source)
        return first
    if not isinstance(config, LoraConfig):
        raise ValueError(f"it is a {type(config).__name__}; give a LoRA (`LoraConfig`).")
    if modules is not None and (isinstance(config.target_modules, str) or config.exclude_modules):
        config.target_modules, config.exclude_modules = list(modules), None
    config.inference_mode = True
    if first is None:
        return PeftModel.from_pretrained(model, source, adapter_name=name, config=config)
    # A second from_pretrained could warn about missing keys, because it takes those of other adapters for its own.
    first.add_adapter(name, config)
    first.load_adapter(source, adapter_name=name)
    return first


def _load_diffusers_lora(model: nn.Module, name: str, source: str) -> None:
    """Loads the denoiser's part of a LoRA file in diffusers' format."""
    loader: Any = getattr(model, "load_lora_adapter", None)
    if loader is None:
        raise ValueError(f"there is no adapter_config.json, and {type(model).__name__} loads only folders of peft.")
    if source.endswith(PICKLES):
        raise ValueError("a pickle runs code when it is opened; save the LoRA with safetensors.")
    loader(
        source, use_safetensors=True, prefix="unet" if hasattr(model, "up_blocks") else "transformer", adapter_name=name
    )
    if name not in lora_names(model):
        raise ValueError(
            f"it has no tensors for {type(model).__name__}: call pipe.load_lora_weights(), which converts more "
            "formats, and compose() by name."
        )
