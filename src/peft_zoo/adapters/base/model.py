"""Base class of tuners: replaces the targeted modules by a method's adapter layers."""

from __future__ import annotations

import re
import warnings
from typing import Any

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_zoo.adapters.base.config import ZooConfig
from peft_zoo.adapters.base.layer import ZooLayer
from peft_zoo.adapters.base.offload import find_misnamed, has_disk_layers
from peft_zoo.adapters.base.tuner import MethodTuner
from peft_zoo.common.modules import plain_name


class ZooModel(MethodTuner):
    """Base of a method's tuner; a method sets its layer class `tuner_layer_cls` and its `prefix`.

    Beyond peft's `BaseTuner`: batches may mix adapters (`adapter_names=`, also with beam search and encoder-decoder
    models); parameters can be targeted (`target_parameters`).
    """

    tuner_layer_cls: type[ZooLayer]
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _finish_injection(self, model: nn.Module, adapter_name: str) -> None:
        self._warn_about_unused_patterns(self.peft_config[adapter_name])

    def _create_and_replace(  # type: ignore[override]
        self,
        config: ZooConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        current_key = plain_name(current_key)
        resolved = config.for_module(current_key)
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{current_key}: nn.MultiheadAttention reads the weight of its {target_name} without calling it, so an "
                f"adapter there would do nothing. Add {target_name!r} to `exclude_modules`."
            )
        layer = self._existing_layer(target, adapter_name, parameter_name)
        if layer is None:
            layer = self._new_layer(target, current_key, parameter_name)
            layer._active_adapter, layer.path = self.active_adapter, current_key
            layer.is_offloaded = has_disk_layers(self.model)
            self._replace_module(parent, target_name, layer, target)
        layer.add_adapter(adapter_name, resolved, inference_mode=config.inference_mode)

    def _existing_layer(self, target: nn.Module, adapter_name: str, parameter_name: str | None) -> ZooLayer | None:
        """Returns the adapter layer at `target` that takes the adapter, or None if a new layer is needed."""
        if not isinstance(target, self.tuner_layer_cls):
            return None
        if parameter_name is not None and (target.parameter_name != parameter_name or adapter_name in target.scaling):
            return None  # the target is another parameter of the same module: layers are nested
        return target

    def _new_layer(self, target: nn.Module, path: str, parameter_name: str | None) -> ZooLayer:
        quantization = get_quantization_kwargs(self.model)
        try:
            if parameter_name is not None:
                return self.tuner_layer_cls.ParamWrapper(target, parameter_name=parameter_name, **quantization)
            return self.tuner_layer_cls(target, **quantization)
        except ValueError as error:
            raise ValueError(f"Target module {path}: {error}. Take it out of `target_modules`.") from error

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replaces a module as peft does, without moving it: the layer is already on its base layer's device."""
        setattr(parent, child_name, new_module)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """Fills in `target_modules` if no parameters are targeted; "all-linear" includes adapted layers."""
        if peft_config.target_modules is None and peft_config.target_parameters:
            return peft_config
        config: Any = super()._prepare_adapter_config(peft_config, model_config)
        if config.target_modules == "all-linear":
            _maybe_include_all_linear_layers(config, self.model)
            config.target_modules |= self._adapted_linear_layers()
        return config

    def _adapted_linear_layers(self) -> set[str]:
        """Returns the names of adapter layers around linear layers, without the output embedding, as peft does."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        return {
            name
            for name, module in self.model.named_modules()
            if isinstance(module, ZooLayer)
            and isinstance(module.base_layer, (nn.Linear, Conv1D))
            and module is not head
        }

    def _check_new_adapter_config(self, config: Any) -> None:
        """Checks as peft does, and that adapters target the same parameters: keys in a file follow their nesting."""
        super()._check_new_adapter_config(config)
        wanted = set(config.target_parameters or ())
        for name, other in self.peft_config.items():
            theirs = set(getattr(other, "target_parameters", None) or ())
            if wanted and theirs and wanted != theirs:
                raise ValueError(
                    f"target_parameters={sorted(wanted)} differs from {sorted(theirs)} of adapter {name!r}; target "
                    "the same parameters in every adapter of a model."
                )

    def _warn_about_unused_patterns(self, config: ZooConfig) -> None:
        """Warns about keys that match no module in the patterns that peft does not check itself."""
        for pattern_name in set(config.patterns) - {"rank_pattern", "alpha_pattern"}:
            unused = [
                key
                for key in getattr(config, pattern_name)
                if not any(re.match(rf"(.*\.)?({key})$", plain_name(name)) for name in self.targeted_module_names)
            ]
            if unused:
                warnings.warn(
                    f"The following {pattern_name} keys did not match any targeted module and were ignored: {unused}.",
                    RuntimeWarning,
                    stacklevel=4,
                )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Casts to float32, or without autocast to the base layers' dtype.

        peft calls it last when it loads an adapter, after accelerate has offloaded the adapter with its base layers.
        """
        for layer in self._zoo_layers():
            find_misnamed(layer, adapter_name)
            if not autocast_adapter_dtype and adapter_name in layer.scaling:
                layer.cast_to_base(adapter_name)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges as peft does; if one layer fails, as one with `safe_merge` may, restores the others."""
        before = {layer: list(layer.merged_adapters) for layer in self._zoo_layers()}
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except BaseException:
            for layer, names in before.items():
                if layer.merged_adapters != names:
                    layer.unmerge()
                    layer.merge(adapter_names=names)
            raise

    def _check_merge_allowed(self) -> None:
        """Warns about weights that other modules share; peft checks only those with the usual names."""
        super()._check_merge_allowed()
        if self._get_tied_target_modules(self.model):
            return
        owners: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name.replace(".base_layer", ""))
        merged = [w for layer in self._zoo_layers() for w in layer.base_layer.parameters(recurse=False)]
        shared = sorted({name for w in merged if len(owners[id(w)]) > 1 for name in owners[id(w)]})
        if shared:
            warnings.warn(
                f"Merging changes a weight that {shared} share, so the merged model differs from the adapted one. "
                "Untie them first, for example with `tie_word_embeddings=False`.",
                stacklevel=3,
            )

    def _zoo_layers(self) -> list[ZooLayer]:
        return [module for module in self.modules() if isinstance(module, ZooLayer)]

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raises a TypeError with the alternative: the update is not linear in its parameters."""
        raise TypeError(
            f"{type(self).__name__} cannot combine adapters into a weighted one, as its update is not linear in its "
            "parameters. Activate several adapters at once: `model.base_model.set_adapter([...])`; their updates add."
        )
