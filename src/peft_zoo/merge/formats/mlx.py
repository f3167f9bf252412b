"""LoRAs of MLX-LM: a folder with `adapters.safetensors`, whose factors are transposed, and one scale for all modules.

MLX-LM computes ``W x + scale (x a) b`` with a `(in, r)` and b `(r, out)`, one rank and one scale. Smaller ranks are
padded with zeros; scales that differ are multiplied into b. The names are those of MLX's own models, which for the
families of Llama and Qwen are transformers'.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_zoo.common.checks import check, check_int, is_number
from peft_zoo.io import LoraAdapter, TensorFile, TensorInfo, TensorWriter, read_json
from peft_zoo.io.expert_names import is_expert
from peft_zoo.io.lora_file import CONFIG_NAME
from peft_zoo.io.lora_settings import MAX_RANK
from peft_zoo.merge.base.plain_lora import Factors, Module, check_drop, drops, file_extras, write_plain_lora
from peft_zoo.merge.formats.format import ConvertOptions, Format, single

WEIGHTS = "adapters.safetensors"
ALL_LAYERS = -1
_IN_LAYER = re.compile(r"(?:.+\.)?layers\.[0-9]+\.(?P<key>.+)")


def _write(adapters: Mapping[str, LoraAdapter], target: Path, options: ConvertOptions) -> list[str]:
    """Writes the LoRA of a language model."""
    adapter = single(adapters, "mlx")
    extra_keys, notes = file_extras(adapter, adapter.config or {})
    check_drop(options.drop, adapter.modules, extra_keys)
    kept = {name: module for name, module in adapter.modules.items() if not drops(name, options.drop)}
    for name, module in kept.items():
        if module.kind != "linear" or is_expert(name) or getattr(module, "experts", None):
            raise NotImplementedError(f"{name}: only linear layers are converted to MLX-LM; drop it, or merge.")
    rank, scales = max(module.rank for module in kept.values()), {module.scale for module in kept.values()}
    scale = next(iter(scales)) if len(scales) == 1 else 1.0
    infos: dict[str, TensorInfo] = {}
    for name, module in kept.items():
        infos[f"{name}.lora_a"] = TensorInfo(module.dtype, (module.in_features, rank))
        infos[f"{name}.lora_b"] = TensorInfo(module.dtype, (rank, module.out_features))
    with TensorWriter(target / WEIGHTS, infos, {"format": "mlx"}) as writer:
        for name, module in kept.items():
            B, A = adapter.factors(name)
            B = B if module.scale == scale else (B.double() * (module.scale / scale)).to(B.dtype)
            found = Factors(B, A).padded(rank)
            writer.write(f"{name}.lora_a", found.A.to(module.dtype).mT.contiguous())
            writer.write(f"{name}.lora_b", found.B.to(module.dtype).mT.contiguous())
    matches = {name: _IN_LAYER.fullmatch(name) for name in kept}
    keys = sorted({match["key"] if match else name for name, match in matches.items()})
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    config = {"fine_tune_type": "lora", "num_layers": ALL_LAYERS, "lora_parameters": parameters}
    (target / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return list(notes)


def _read(path: Path, folder: Path, options: ConvertOptions) -> list[str]:
    """Writes a folder of peft."""
    config = read_json(path / CONFIG_NAME, path)
    kind, parameters = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind != "lora":
        raise NotImplementedError(f"fine_tune_type={kind!r}: only LoRAs of MLX-LM are converted.")
    check(isinstance(parameters, dict), "lora_parameters", parameters, "config needs rank and scale")
    assert isinstance(parameters, dict)
    check_int("rank", parameters.get("rank"), 1, MAX_RANK)
    scale: Any = parameters.get("scale")
    check(is_number(scale) and abs(float(scale)) < 1e30, "scale", scale, "it must be a finite number")
    modules, factors = dict[str, Module](), dict[str, Factors]()
    with TensorFile(path / WEIGHTS, path) as file:
        names = {key.rpartition(".")[0] for key in file.tensors}
        odd = sorted(file.tensors.keys() ^ {f"{name}.lora_{part}" for name in names for part in "ab"})
        check(not odd and bool(names), WEIGHTS, odd[:1], "each module needs lora_a and lora_b, and nothing else")
        for name in sorted(names):
            a, b = (file.read_finite(f"{name}.lora_{part}") for part in "ab")
            if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or a.shape[1] != parameters["rank"]:
                shapes = f"lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)}"
                raise ValueError(f"{name}: {shapes} are not factors of rank {parameters['rank']}; get the file again.")
            modules[name] = Module(name, "linear", (len(a),), a.dtype)
            factors[name] = Factors(b.mT.contiguous(), a.mT.contiguous(), float(scale))
    write_plain_lora(folder, {}, modules, factors, False)
    return []


def _owns(path: Path) -> bool:
    """Whether a folder has the weights file of MLX-LM."""
    return path.is_dir() and (path / WEIGHTS).exists()


FORMAT = Format("mlx", "MLX-LM", "", _write, _read, _owns)
