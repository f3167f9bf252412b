"""Reads factors from adapter files and writes the compressed adapter to new files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_zoo.common.atomic import check_new_folder, new_folder
from peft_zoo.io import LoraAdapter, Role, TensorWriter, copy_regular, parse_json
from peft_zoo.io.expert_names import check_plain_names, is_expert
from peft_zoo.io.lora_config import target_fields, write_config
from peft_zoo.io.lora_file import WEIGHTS_NAME
from peft_zoo.io.lora_ranks import RankAndScale, rank_fields
from peft_zoo.io.lora_settings import DIFFUSERS_METADATA
from peft_zoo.merge.squeeze.source import SqueezeFactors

CARD = "README.md"
LARGEST_CARD = 1 << 20  # bytes
SLACK = 4096  # bytes for alphas and for header fields other than the metadata, which may become longer
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")  # of the old tensors


class FileSource:
    """Modules of an open adapter in files, and the path of the result; None to read only."""

    def __init__(self, adapter: LoraAdapter, source: Path, target: Path | None) -> None:
        self.adapter, self.source, self.target = adapter, source, target
        self.names: Sequence[str] = list(adapter.modules)
        if target is None:
            return
        if adapter.config is None and target.suffix != ".safetensors":
            raise ValueError(
                f"out_dir={str(target)!r}: {source} is a single file, so give the name of a .safetensors file."
            )
        if adapter.config is not None:
            check_new_folder(target)
            check_plain_names(self.names, adapter.config)
        elif target.exists():
            raise ValueError(f"out_dir={str(target)!r} exists; give a new name.")

    def adjusted(self, modules: Mapping[str, RankAndScale], exceed: bool) -> dict[str, RankAndScale]:
        """Changes planned ranks and scales to those that the loaders of the file read as they were written.

        Routed experts get one rank, the largest if `exceed`, else the largest that needs no more parameters. Alphas
        that would differ become one, because the loader of diffusers does not bring each alpha to its module.
        """
        experts = [name for name in modules if is_expert(name)] if self.adapter.config is not None else []
        if len({modules[name] for name in experts}) > 1:
            sizes = {name: sum(self.adapter.modules[name].sizes) for name in experts}
            total = sum(modules[name].rank * size for name, size in sizes.items())
            largest = min(min(self.adapter.modules[name].sizes) for name in experts)
            rank = max(modules[name].rank for name in experts) if exceed else total // sum(sizes.values())
            modules = {**modules, **dict.fromkeys(experts, RankAndScale(max(1, min(rank, largest)), 1.0))}
        kept = _kept(modules)
        alphas = {new.rank * new.scale for new in kept.values()}
        has_alpha = any(Role.ALPHA in module.keys for module in self.adapter.modules.values())
        if self.adapter.config is None and has_alpha and len(alphas) > 1:
            alpha = Counter(new.rank for new in kept.values()).most_common(1)[0][0]
            modules = {name: RankAndScale(new.rank, alpha / (new.rank or 1)) for name, new in modules.items()}
        return dict(modules)

    def overhead(self, modules: Mapping[str, RankAndScale]) -> int:
        """Upper bound for the size of header and other tensors in the new file, in bytes."""
        file, adapter = self.adapter.file, self.adapter
        factors = {key for module in adapter.modules.values() for key in (module.key_A, module.key_B)}
        data = sum(info.nbytes for info in file.tensors.values())
        others = sum(info.nbytes for key, info in file.tensors.items() if key not in factors)
        texts = json.dumps(_metadata(adapter, _kept(modules), modules) or {})
        growth = max(0, len(texts) - len(json.dumps(file.metadata)))
        without = sum(Role.ALPHA not in module.keys for module in adapter.modules.values())
        added = 256 * without if without < len(adapter.modules) else 0  # alphas that may be added
        return file.path.stat().st_size - data + growth + SLACK + others + added

    def factors(self, name: str) -> SqueezeFactors:
        """Reads the factors of one module.

        A module with a magnitude or bias, which act alone, and a routed expert may not be dropped.
        """
        module = self.adapter.modules[name]
        undroppable = Role.MAGNITUDE in module.keys or Role.BIAS in module.keys or is_expert(name)
        return SqueezeFactors(*self.adapter.factors(name), module.scale, int(undroppable))

    def weight_norm(self, name: str) -> float:
        """Raises a ValueError: adapter files do not contain the base weights."""
        raise ValueError("score='relative' needs the base model's weights; use squeeze_model.")

    def write(
        self, modules: Mapping[str, RankAndScale], factors: Iterable[tuple[str, Tensor, Tensor]]
    ) -> dict[str, float]:
        """Writes the adapter with new ranks, scales and factors, without modules of rank 0, and copies the rest."""
        if self.target is None:
            raise ValueError("target=None: this source was opened to be read only.")
        kept = _kept(modules)
        metadata = _metadata(self.adapter, kept, modules)
        if self.adapter.config is None:
            self._write_tensors(self.target, kept, factors, metadata)
            return {}
        with new_folder(self.target) as folder:
            self._write_tensors(folder / WEIGHTS_NAME, kept, factors, metadata)
            write_config(folder, self.adapter.config, kept, modules)
            card = self.source / CARD
            if card.is_file() and card.stat().st_size <= LARGEST_CARD:
                copy_regular(card, folder / CARD, self.source)
        return {}

    def _write_tensors(
        self,
        path: Path,
        modules: Mapping[str, RankAndScale],
        factors: Iterable[tuple[str, Tensor, Tensor]],
        metadata: Mapping[str, str] | None,
    ) -> None:
        """Writes the new safetensors file."""
        adapter = self.adapter
        infos = {key: adapter.file.tensors[key] for key in adapter.other_keys}
        for name, new in modules.items():
            infos |= adapter.new_infos(name, *new)
        with TensorWriter(path, infos, metadata) as writer:
            for key in adapter.other_keys:
                writer.write(key, adapter.read(key))
            for name, B, A in factors:
                for key, tensor in adapter.new_tensors(name, B, A, modules[name].scale).items():
                    writer.write(key, tensor)


def _kept(modules: Mapping[str, RankAndScale]) -> dict[str, RankAndScale]:
    """Modules that are not dropped."""
    return {name: new for name, new in modules.items() if new.rank}


def _metadata(
    adapter: LoraAdapter, modules: Mapping[str, RankAndScale], before: Iterable[str]
) -> dict[str, str] | None:
    """Metadata with new ranks and alphas, without hashes; `before` has the names of all modules of the adapter."""
    texts = {name: text for name, text in adapter.file.metadata.items() if name not in HASHES}
    if DIFFUSERS_METADATA in texts and adapter.format == "diffusers_peft":
        configs = _diffusers_configs(texts[DIFFUSERS_METADATA], modules, before)
        texts[DIFFUSERS_METADATA] = json.dumps(configs, indent=2, sort_keys=True)
    new = rank_fields(modules)
    for text, field, pattern in (
        ("ss_network_dim", "r", "rank_pattern"),
        ("ss_network_alpha", "lora_alpha", "alpha_pattern"),
    ):
        if text in texts:
            texts[text] = "Dynamic" if new[pattern] else str(new[field])
    return texts or None


def _diffusers_configs(text: str, modules: Mapping[str, RankAndScale], before: Iterable[str]) -> dict[str, Any]:
    """Configurations in the metadata of diffusers (`unet.r` and so on) with the new ranks and alphas."""
    configs = parse_json(text.encode("utf-8"))
    for part in sorted({name.partition(".")[0] for name in configs if "." in name}) or [""]:
        prefix = f"{part}." if part else ""
        own = {name.removeprefix(prefix): new for name, new in modules.items() if name.startswith(prefix)}
        if own:
            others = (name.removeprefix(prefix) for name in before if name.startswith(prefix))
            new = {**rank_fields(own), "use_rslora": False, **target_fields(own, others)}
            configs |= {prefix + field: value for field, value in new.items()}
    return configs
