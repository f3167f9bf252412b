"""A LoRA in files as a source of factors, and the compressed one written beside it, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_zoo.io import LoraAdapter, Role, TensorInfo, new_file, new_folder, parse_json, write_tensors
from peft_zoo.io.lora_config import target_fields, write_config
from peft_zoo.io.lora_file import WEIGHTS_NAME
from peft_zoo.io.lora_ranks import RankAndScale, alpha_of, rank_fields
from peft_zoo.io.lora_settings import DIFFUSERS_METADATA
from peft_zoo.merge.squeeze.source import Factors, Make

CARD = "README.md"
LARGEST_CARD = 1 << 20  # bytes
SLACK = 4096  # bytes for what may grow besides the texts of a header: numbers in it, and alphas
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")  # of tensors that are no longer there


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

    def overhead(self, modules: Mapping[str, RankAndScale]) -> int:
        """Bytes of the file besides factors: header and other tensors."""
        file, adapter = self.adapter.file, self.adapter
        factors = {key for module in adapter.modules.values() for key in (module.key_A, module.key_B)}
        data = sum(info.nbytes for info in file.tensors.values())
        others = sum(info.nbytes for key, info in file.tensors.items() if key not in factors)
        texts = json.dumps(_metadata(adapter, _left(modules), modules) or {})
        growth = max(0, len(texts) - len(json.dumps(file.metadata)))
        return file.path.stat().st_size - data + growth + SLACK + others

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
        adapter, kept = self.adapter, _left(modules)
        content = _Content(adapter, kept, make)
        metadata = _metadata(adapter, kept, modules)
        if adapter.config is None:
            with new_file(self.target) as path:
                write_tensors(path, content.infos, content.produce, metadata)
            return {}
        with new_folder(self.target) as folder:
            write_tensors(folder / WEIGHTS_NAME, content.infos, content.produce, metadata)
            write_config(folder, adapter.config, kept, modules)
            card = self.source / CARD
            if card.is_file() and card.stat().st_size <= LARGEST_CARD:
                shutil.copyfile(card, folder / CARD)
        return {}


def _left(modules: Mapping[str, RankAndScale]) -> dict[str, RankAndScale]:
    """Those that are not dropped."""
    return {name: new for name, new in modules.items() if new.rank}


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


def _metadata(
    adapter: LoraAdapter, modules: Mapping[str, RankAndScale], before: Iterable[str]
) -> dict[str, str] | None:
    """The texts of the file's header, where they speak of rank and alpha with the new ones."""
    texts = {name: text for name, text in adapter.file.metadata.items() if name not in HASHES}
    if DIFFUSERS_METADATA in texts and adapter.format == "diffusers_peft":
        configs = _diffusers(texts[DIFFUSERS_METADATA], modules, before)
        texts[DIFFUSERS_METADATA] = json.dumps(configs, indent=2, sort_keys=True)
    spoken = rank_fields(modules)
    for text, field, pattern in (
        ("ss_network_dim", "r", "rank_pattern"),
        ("ss_network_alpha", "lora_alpha", "alpha_pattern"),
    ):
        if text in texts:
            texts[text] = "Dynamic" if spoken[pattern] else str(spoken[field])
    return texts or None


def _diffusers(text: str, modules: Mapping[str, RankAndScale], before: Iterable[str]) -> dict[str, Any]:
    """What diffusers keeps of the configurations of a file's parts, `unet.r` and so on."""
    known = parse_json(text.encode("utf-8"))
    for part in sorted({name.partition(".")[0] for name in known if "." in name}) or [""]:
        prefix = f"{part}." if part else ""
        own = {name.removeprefix(prefix): new for name, new in modules.items() if name.startswith(prefix)}
        if own:
            others = (name.removeprefix(prefix) for name in before if name.startswith(prefix))
            new = {**rank_fields(own), "use_rslora": False, **target_fields(own, others)}
            known |= {prefix + field: value for field, value in new.items()}
    return known
