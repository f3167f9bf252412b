"""Describes a saved adapter, LoRA file, recipe or model from its untrusted files, and what is wrong with them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from peft_zoo.adapters.base.loading import check_fields, made_config
from peft_zoo.adapters.base.source import AdapterSource, check_finite, check_literal, module_names
from peft_zoo.io import open_adapter
from peft_zoo.io.checkpoint import Checkpoint
from peft_zoo.io.digest import DIGEST, check_digest
from peft_zoo.io.header import TensorInfo
from peft_zoo.io.safetensors import TensorFile
from peft_zoo.io.strict_json import read_json


@dataclass
class Inspection:
    """What was found.

    Attributes:
        facts: Values by name, such as the type, the rank and the number of tensors.
        problems: One sentence for each check that failed.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def check(self) -> Iterator[None]:
        """Notes the ValueError, NotImplementedError or OSError of the block as a problem."""
        try:
            yield
        except (ValueError, NotImplementedError, OSError) as error:
            self.problems.append(" ".join(str(error).split()))


def inspect(path: str | Path) -> Inspection:
    """Describes the adapter, LoRA file, recipe or model at `path`, reading its tensors one by one and making no model.

    Raises:
        ValueError: If there is nothing at `path`.
    """
    path, found = Path(path), Inspection()
    if path.is_file():
        _inspect_file(path, found)
    elif (path / CONFIG_NAME).exists() or (path / SAFETENSORS_WEIGHTS_NAME).exists():
        _inspect_adapter(path, found)
    elif (path / "config.json").exists():
        _inspect_model(path, found)
    else:
        raise ValueError(f"{path} has no {CONFIG_NAME} and no config.json; give a saved folder or a .safetensors file.")
    return found


def _inspect_adapter(folder: Path, found: Inspection) -> None:
    """Describes a folder of peft, with every check of `load_adapter` that needs no model."""
    source = AdapterSource(str(folder))
    fields: Mapping[str, Any] = {}
    with found.check():
        fields = source.config()
    kind = fields.get("peft_type")
    config_cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None  # type: ignore[call-overload]
    found.facts["holds"] = f"an adapter of type {kind}"
    for name in ("base_model_name_or_path", "r", "target_modules", DIGEST):
        if fields.get(name) is not None:
            found.facts[name] = fields[name]
    if config_cls is None:
        found.problems.append(f"peft_type={kind!r} is unknown here; it is a type of a newer or another package.")
    else:
        with found.check():
            check_fields(fields, config_cls)
        with found.check():
            check_literal(fields, source.module_names)
        with found.check():
            made_config(config_cls, fields)
    if not getattr(config_cls, "trainable", True):
        found.facts["holds"] = f"a recipe of type {kind}, without weights of its own"
        return
    with found.check(), TensorFile(source.weights(), folder) as file:
        _describe(file.tensors.values(), module_names(file.tensors), found)
        with found.check():
            check_digest(fields, file.path)
        with found.check():
            check_finite(file)


def _inspect_file(path: Path, found: Inspection) -> None:
    """Describes a safetensors file: a LoRA of sd-scripts or diffusers, or other tensors."""
    found.facts["holds"] = "a file that cannot be read"
    with found.check():
        with TensorFile(path) as file:
            found.facts["holds"] = "a safetensors file"
            _describe(file.tensors.values(), (), found)
            check_finite(file)
        with open_adapter(path) as adapter:
            ranks = sorted(module.rank for module in adapter.modules.values())
            found.facts |= {"holds": f"a LoRA in the format {adapter.format}", "modules": len(ranks)}
            found.facts["ranks"] = f"{ranks[0]} to {ranks[-1]}"


def _inspect_model(folder: Path, found: Inspection) -> None:
    """Describes the checkpoint of a whole model."""
    with found.check():
        config = read_json(folder / "config.json", folder)
        method = config.get("quantization_config")
        quantized = f", quantized as {method.get('quant_method')}" if isinstance(method, dict) else ""
        found.facts["holds"] = f"a model of type {config.get('model_type')}{quantized}"
        with Checkpoint(folder) as checkpoint:
            _describe(checkpoint.tensors.values(), (), found)


def _describe(infos: Iterable[TensorInfo], modules: Iterable[str], found: Inspection) -> None:
    """Adds the numbers of tensors, values and bytes, and the dtypes."""
    infos = list(infos)
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in infos)
    found.facts |= {"modules": count} if (count := len(set(modules))) else {}
    found.facts |= {
        "tensors": len(infos),
        "values": sum(math.prod(info.shape) for info in infos),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": ", ".join(f"{dtype} ({number})" for dtype, number in sorted(dtypes.items())),
    }
