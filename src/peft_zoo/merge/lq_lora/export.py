r"""An LQ-LoRA in files as a plain LoRA for the model before it was quantized.

Training began at `W ~ Q + B0 A0` and ended at `Q + s B A`. What it learned is the difference::

    s B A - B0 A0  =  [s B, -B0] [A; A0]          a LoRA of rank r + r0 for W

which peft, diffusers and every server of LoRAs can load. It makes W + s B A - B0 A0 of the base model where the adapter
made Q + s B A: they differ by what quantizing lost, `W - Q - B0 A0`.

Source: the same difference of factors is how PiSSA (arXiv 2404.02948), section 3, is shared as a LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_zoo.adapters.lq_lora.config import LqLoraConfig
from peft_zoo.adapters.lq_lora.nf_linear import NF8_CONFIG, Factors, NFLinear, nf8_rank, unpack_factors
from peft_zoo.common.atomic import new_folder
from peft_zoo.io import LoraAdapter, TensorFile, TensorInfo, TensorWriter, read_json
from peft_zoo.io.lora_config import write_config
from peft_zoo.io.lora_file import CONFIG_NAME, WEIGHTS_NAME
from peft_zoo.io.lora_ranks import RankAndScale
from peft_zoo.kernels.normal_float.quantize import NFTensor, empty_nf
from peft_zoo.registration import peft_type_of

__all__ = ["QuantizedMatrix", "to_lora"]


@dataclass(frozen=True)
class QuantizedMatrix:
    """What became of one matrix that was quantized.

    Attributes:
        name: Of its module.
        numbers: How many it has.
        config: The five values of how it is quantized; None where no block fits its rows and it is as it was.
        rank: Of the part of low rank beside it.
        bits: Of a number of the matrix, without that part.
        error: `|W - Q - B A| / |W|` in the Frobenius norm, or in the weighted one.
    """

    name: str
    numbers: int
    config: tuple[Any, ...] | None
    rank: int
    bits: float
    error: float


def to_lora(folder: str | Path, out_dir: str | Path) -> Path:
    """Write what an LQ-LoRA learned as a LoRA of twice its rank for the base model in floating-point.

    Args:
        folder: Has `adapter_config.json` and `adapter_model.safetensors`, as `save_pretrained` writes them; the
            adapter was made with `keep_init=True` or "nf8". The base model is not needed.
        out_dir: A folder that does not exist or is empty; it appears whole or not at all.

    Returns:
        `out_dir`. Of layers that were not quantized the LoRA is as it was.

    Raises:
        ValueError: If it is another kind of adapter, what was split off is not in the file, or the file is not what
            its configuration says.
    """
    source = Path(folder)
    config = read_json(source / CONFIG_NAME)
    kind = peft_type_of(LqLoraConfig).value
    if config.get("peft_type") != kind:
        raise ValueError(f"{source}: peft_type={config.get('peft_type')!r} is not {kind!r}; give an LQ-LoRA.")
    if config.get("save_base") == "none":
        raise ValueError(
            f"{source}: save_base='none' left out what was split off; load the adapter onto its base, set "
            "save_base='quantized' in its configuration, and save it again."
        )
    with TensorFile(source / WEIGHTS_NAME) as file:
        adapter = LoraAdapter(file, {**config, "peft_type": "LORA"})
        modules = {name: _new_rank_and_scale(adapter, name) for name in adapter.modules}
        with new_folder(out_dir) as new:
            _write_tensors(new / WEIGHTS_NAME, adapter, modules)
            write_config(new, config, modules, modules)
    return Path(out_dir)


def _new_rank_and_scale(adapter: LoraAdapter, name: str) -> RankAndScale:
    """Rank and scale of a module in the exported LoRA; those of the adapter if its base layer is not quantized."""
    module = adapter.modules[name]
    if not _is_quantized(adapter, name):
        return RankAndScale(module.rank, module.scale)
    return RankAndScale(module.rank + _first_rank(adapter, name), 1.0)


def _write_tensors(path: Path, adapter: LoraAdapter, modules: Mapping[str, RankAndScale]) -> None:
    """Writes the tensors of the exported LoRA, one module at a time."""
    dropped = {_key(name, part) for name in modules for part in NFLinear.ALL}
    copied = [key for key in adapter.other_keys if key not in dropped]
    infos: dict[str, TensorInfo] = {}
    for name, new in modules.items():
        if _is_quantized(adapter, name):
            infos |= adapter.new_infos(name, *new)
        else:
            copied += adapter.modules[name].keys.values()
    infos |= {key: adapter.file.tensors[key] for key in copied}
    with TensorWriter(path, infos, {"format": "pt"}) as writer:
        for key in copied:
            writer.write(key, adapter.read(key))
        for name, new in modules.items():
            if _is_quantized(adapter, name):
                for key, tensor in adapter.new_tensors(name, *_difference(adapter, name), new.scale).items():
                    writer.write(key, tensor)


def _difference(adapter: LoraAdapter, name: str) -> tuple[Tensor, Tensor]:
    """Factors B and A of `s B A - B0 A0` of a quantized module, in float32."""
    B, A = adapter.factors(name)
    module = adapter.modules[name]
    first_B, first_A = _initial_factors(adapter, name)
    return torch.cat([module.scale * B.float(), -first_B], 1), torch.cat([A.float(), first_A])


def _initial_factors(adapter: LoraAdapter, name: str) -> Factors:
    """Initial factors B0 and A0 of a quantized module, in float32."""
    if _key(name, NFLinear.INITIAL[0]) in adapter.file.tensors:
        first_B, first_A = (adapter.read(_key(name, part)).float() for part in NFLinear.INITIAL)
        return first_B, first_A
    packed = NFTensor(*(adapter.read(_key(name, part)) for part in NFLinear.INITIAL_NF8))
    module = adapter.modules[name]
    return unpack_factors(packed, (module.out_features, module.in_features))


def _is_quantized(adapter: LoraAdapter, name: str) -> bool:
    """Whether the base layer of a module is quantized."""
    return _key(name, "codes") in adapter.file.tensors


def _key(name: str, part: str) -> str:
    """Where a part of a quantized layer is in the file."""
    return f"base_model.model.{name}.base_layer.{part}"


def _first_rank(adapter: LoraAdapter, name: str) -> int:
    """The rank of what was split off a module."""
    module, infos = adapter.modules[name], dict[str, TensorInfo]()
    for part in (*NFLinear.INITIAL, *NFLinear.INITIAL_NF8):
        if (info := adapter.file.tensors.get(_key(name, part))) is not None:
            infos[part] = info
    rows, columns = module.out_features, module.in_features
    if infos.keys() == set(NFLinear.INITIAL):
        rank = infos["initial_A"].shape[0]
        wanted: dict[str, tuple[int, ...]] = {"initial_B": (rows, rank), "initial_A": (rank, columns)}
    elif infos.keys() == set(NFLinear.INITIAL_NF8):
        rank = nf8_rank(infos["initial_codes"].numel, (rows, columns))
        empty = empty_nf(NF8_CONFIG, rank * (rows + columns), "meta")
        wanted = {part: tuple(tensor.shape) for part, tensor in zip(NFLinear.INITIAL_NF8, empty, strict=True)}
    else:
        raise ValueError(
            f"{adapter.file.path}: what was split off {name} was not kept; quantize with keep_init=True to have a LoRA "
            "for the base model, or merge."
        )
    for part, shape in wanted.items():
        if infos[part].shape != shape:
            raise ValueError(
                f"module {name}: {part} {infos[part].shape} does not fit its LoRA, {shape} does; get the file again."
            )
    return rank
