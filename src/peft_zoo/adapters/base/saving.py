"""Saves adapters: names of modules instead of regular expressions, a checksum of the weights, whole folders at once."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from peft_zoo.adapters.base.source import check_adapter_name, expressions
from peft_zoo.common.atomic import replaced_folder
from peft_zoo.common.modules import plain_name

#: Attribute of a tuner's configuration with the `ExactNames` of its adapter; it is no field.
NAMES = "_exact_names"


def save_adapter(model: PeftModel, folder: str, adapter_name: str | None = None, **kwargs: Any) -> None:
    """Saves one adapter so that `folder` holds the old adapter or the new one, whenever the process is killed.

    `PeftModel.save_pretrained` writes one file after the other: killed in between, it leaves a folder that adapters of
    peft-zoo refuse to load. Other files in `folder` are kept.

    Args:
        model: Model with the adapter.
        folder: Folder for `adapter_config.json`, `adapter_model.safetensors` and `README.md`, also if the adapter is
            not called "default".
        adapter_name: Adapter to save; None: the active one.
        kwargs: Further arguments of `PeftModel.save_pretrained`, such as `state_dict`.

    Raises:
        ValueError: If the model has no such adapter, several adapters are active, `folder` is a file, or another
            process has replaced it in the meantime: of several processes, only one saves.

    Examples:
        >>> import os, tempfile, torch
        >>> from peft import get_peft_model
        >>> from peft_zoo import SnellConfig, save_adapter
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), SnellConfig(r=2, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, folder)
        ...     sorted(os.listdir(folder))
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    active = model.active_adapters
    if adapter_name is None and len(active) != 1:
        raise ValueError(f"adapter_name=None, but {active} are active; name the one to save.")
    name = adapter_name or active[0]
    check_adapter_name(name)
    if name not in model.peft_config:
        raise ValueError(
            f"adapter_name={name!r} is none of the model's adapters: use one of {list(model.peft_config)}."
        )
    with replaced_folder(folder) as work, tempfile.TemporaryDirectory(dir=work) as new:
        card = work / "README.md"
        if card.is_file():  # peft completes the one that is there
            shutil.copyfile(card, Path(new, card.name))
        model.save_pretrained(new, selected_adapters=[name], **kwargs)
        own = Path(new, name)
        for place in (Path(new), own):  # the weights are in a subfolder unless the adapter is called "default"
            for file in place.iterdir() if place.is_dir() else ():
                if file != own:
                    _move(file, work / file.name)


def _move(source: Path, target: Path) -> None:
    """Moves a file or a folder to `target` in place of what is there."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    source.replace(target)


@dataclasses.dataclass(frozen=True)
class ExactNames:
    """Names with which peft's rules choose exactly the modules of an adapter.

    Attributes:
        targets: Names of the modules that have the adapter.
        excluded: Names of further modules that end like one of them.
    """

    targets: tuple[str, ...]
    excluded: tuple[str, ...]


def exact_names(config: Any, model: nn.Module, adapter_name: str) -> ExactNames | None:
    """Returns the names of the modules with an adapter; None for a configuration of names only, or with parameters.

    Args:
        config: The adapter's configuration.
        model: Base model that has the adapter.
        adapter_name: Name of the adapter.
    """
    if getattr(config, "target_parameters", None) or not any(expressions(dataclasses.asdict(config))):
        return None
    modules = {plain_name(name): module for name, module in model.named_modules()}
    layers = {name: module for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
    targets = tuple(name for name, layer in layers.items() if adapter_name in layer._get_available_adapters())
    plain = copy.copy(config)
    _name(plain, ExactNames(targets, ()))
    names = [name for name in modules if not any(name.startswith(f"{layer}.") for layer in layers)]
    surplus = tuple(name for name in names if name not in targets and check_target_module_exists(plain, name))
    return ExactNames(targets, surplus)


def named_exactly(config: Any, model: nn.Module, adapter_name: str) -> Any:
    """Returns a copy of an adapter's configuration with names instead of expressions, for a type that saves both."""
    named = copy.copy(config)
    vars(named)[NAMES] = exact_names(config, model, adapter_name)
    return with_exact_names(named)


def with_exact_names(config: PeftConfig) -> PeftConfig:
    """Returns a copy of a configuration to save: names of modules replace its regular expressions."""
    found = vars(config).get(NAMES)
    changed: Any = copy.copy(config)
    if found is None:
        return changed
    for field in dataclasses.fields(changed):
        pattern = getattr(changed, field.name)
        if field.name.endswith("_pattern") and isinstance(pattern, dict):
            keys = {name: get_pattern_key(list(pattern), name) for name in found.targets}
            values = {f"^{name}$": pattern[key] for name, key in keys.items() if key in pattern}
            setattr(changed, field.name, values)
    _name(changed, found)
    return changed


def _name(config: Any, names: ExactNames) -> None:
    """Makes a configuration choose modules by their names."""
    config.target_modules, config.exclude_modules = list(names.targets), list(names.excluded) or None
    config.layers_to_transform = config.layers_pattern = None
