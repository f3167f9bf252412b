"""A LoRA in files as a source of factors, and the compressed one written beside it, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor

from peft_zoo.adapters.base.patterns import RankAndScale, alpha_of, rank_fields
from peft_zoo.merge.base import LoraAdapter, Role, TensorInfo, new_file, new_folder, parse_json, write_tensors
from peft_zoo.merge.base.adapter import CONFIG_NAME, WEIGHTS_NAME
from peft_zoo.merge.base.settings import DIFFUSERS_METADATA
from peft_zoo.merge.squeeze_source import Factors, Make

CARD = "README.md"
LARGEST_CARD = 1 << 20  # bytes
SLACK = 4096  # bytes by which a header may grow


class FileSource:
    """The modules of an adapter in files.

    Args:
        adapter: The open adapter.
        source: Its path.
        target: Where the result goes; None if nothing will be written.

    Raises:
        ValueError: If there is something at `target`, or it is no name for what would be written.
    """

    def __init__(self, adapter: LoraAdapter, source: Path, target: Path | None) -> None:
        self.adapter, self.source, self.target = adapter, source, target
        self.names: Sequence[str] = list(adapter.modules)
        if target is None:
            return
        if adapter.config is None and target.suffix != ".safetensors":
            raise ValueError(
                f"out_dir={str(target)!r}: {source} is a single file, so give the name of a .safetensors file."
            )
        if target.exists() and not (adapter.config is not None and target.is_dir() and not any(target.iterdir())):
            raise ValueError(f"out_dir={str(target)!r} exists; give a new name.")

    @property
    def reserved(self) -> int:
        """Bytes of the file besides factors: header and other tensors."""
        tensors = self.adapter.file.tensors
        factors = {key for module in self.adapter.modules.values() for key in (module.key_A, module.key_B)}
        data = sum(info.nbytes for info in tensors.values())
        header = self.adapter.file.path.stat().st_size - data
        return header + SLACK + sum(info.nbytes for key, info in tensors.items() if key not in factors)

    def factors(self, name: str) -> Factors:
        """One module, read now. One with a magnitude or a bias cannot be dropped: these act without the factors."""
        module = self.adapter.modules[name]
        stays = Role.MAGNITUDE in module.keys or Role.BIAS in module.keys
        return Factors(*self.adapter.factors(name), module.scale, int(stays))

    def weight_norm(self, name: str) -> float:
        """Files do not know the base weights."""
        raise ValueError("score='relative' needs the base model's weights; use squeeze_model.")

    def write(self, modules: Mapping[str, RankAndScale], make: Make) -> dict[str, float]:
        """Writes the adapter with new factors; all else is copied."""
        if self.target is None:
            raise ValueError("target=None: this source was opened to be read only.")
        adapter, kept = self.adapter, {name: new for name, new in modules.items() if new.rank}
        content = _Content(adapter, kept, make)
        metadata = _metadata(adapter, kept)
        if adapter.config is None:
            with new_file(self.target) as path:
                write_tensors(path, content.infos, content.produce, metadata)
            return {}
        with new_folder(self.target) as folder:
            write_tensors(folder / WEIGHTS_NAME, content.infos, content.produce, metadata)
            config = json.dumps(_config(adapter.config, kept, len(modules)), indent=2, sort_keys=True)
            (folder / CONFIG_NAME).write_text(config, encoding="utf-8")
            card = self.source / CARD
            if card.is_file() and card.stat().st_size <= LARGEST_CARD:
                shutil.copyfile(card, folder / CARD)
        return {}


class _Content:
    """The tensors of the new file: what they will be, and each when it is asked for."""

    def __init__(self, adapter: LoraAdapter, modules: Mapping[str, RankAndScale], make: Make) -> None:
        self.adapter, self.modules, self.make = adapter, modules, make
        self.infos = {key: adapter.file.tensors[key] for key in adapter.other_keys}
        self.owner: dict[str, tuple[str, Role]] = {}
        self.ready: dict[str, Tensor] = {}  # the other factor of the module that was made last
        for name, new in modules.items():
            for role, key in adapter.modules[name].keys.items():
                self.owner[key] = name, role
                self.infos[key] = self._alpha(name).info if role is Role.ALPHA else adapter.file.tensors[key]
            self.infos |= adapter.restored_infos(name, new.rank)

    def produce(self, key: str) -> Tensor:
        """One tensor."""
        if key not in self.owner:
            return self.adapter.read(key)
        name, role = self.owner[key]
        if role is Role.ALPHA:
            return self._alpha(name).tensor
        if role is Role.BIAS:  # multiplied by the scale as the factors are
            old = self.adapter.read(key)
            return (old.double() * (self.adapter.modules[name].scale / self.modules[name].scale)).to(old.dtype)
        if role is Role.MAGNITUDE:
            return self.adapter.read(key)
        if key not in self.ready:
            self.ready = self.adapter.restore(name, *self.make(name))
        return self.ready.pop(key)

    def _alpha(self, name: str) -> _Alpha:
        info = self.adapter.file.tensors[self.adapter.modules[name].keys[Role.ALPHA]]
        value = alpha_of(self.modules[name].scale, self.modules[name].rank, use_rslora=False)
        tensor = torch.full(info.shape, value, dtype=torch.float64)
        exact = tensor.to(info.dtype)
        return _Alpha(exact if torch.equal(exact.double(), tensor) else tensor.to(torch.float32))


class _Alpha(NamedTuple):
    """The number alpha as a file stores it."""

    tensor: Tensor

    @property
    def info(self) -> TensorInfo:
        """What the header says of it."""
        return TensorInfo(self.tensor.dtype, tuple(self.tensor.shape))


def _config(old: Mapping[str, Any], modules: Mapping[str, RankAndScale], count: int) -> dict[str, Any]:
    """The configuration of the result: a plain LoRA, whatever it was compressed by before."""
    known = {item.name for item in fields(LoraConfig)} | {"peft_version"}
    new = {name: value for name, value in old.items() if name in known or old.get("peft_type") == "LORA"}
    uniform = len({module.rank for module in modules.values()}) == 1
    folded = {module.scale for module in modules.values()} == {1.0}
    rslora = bool(old.get("use_rslora")) and uniform and not folded
    new |= {"peft_type": "LORA", "use_rslora": rslora, **rank_fields(modules, rslora)}
    if isinstance(new.get("init_lora_weights"), str):
        new["init_lora_weights"] = True  # how the factors began no longer matters
    if len(modules) < count:
        new["target_modules"], new["exclude_modules"] = sorted(modules), None
    return new


def _metadata(adapter: LoraAdapter, modules: Mapping[str, RankAndScale]) -> dict[str, str] | None:
    """The texts of the file's header, where they speak of rank and alpha with the new ones."""
    texts = dict(adapter.file.metadata)
    if DIFFUSERS_METADATA in texts and adapter.format == "diffusers_peft":
        texts[DIFFUSERS_METADATA] = json.dumps(_diffusers(texts[DIFFUSERS_METADATA], modules), indent=2, sort_keys=True)
    spoken = rank_fields(modules)
    for text, field in (("ss_network_dim", "r"), ("ss_network_alpha", "lora_alpha")):
        if text in texts:
            varies = spoken["rank_pattern"] or spoken["alpha_pattern"]
            texts[text] = "Dynamic" if varies else str(spoken[field])
    return texts or None


def _diffusers(text: str, modules: Mapping[str, RankAndScale]) -> dict[str, Any]:
    """What diffusers keeps of the configurations of a file's parts, `unet.r` and so on."""
    known = parse_json(text.encode("utf-8"))
    for part in sorted({name.partition(".")[0] for name in known if "." in name}) or [""]:
        prefix = f"{part}." if part else ""
        own = {name.removeprefix(prefix): new for name, new in modules.items() if name.startswith(prefix)}
        if own:
            known |= {prefix + field: value for field, value in {**rank_fields(own), "use_rslora": False}.items()}
    return known
