r"""Exports an LQ-LoRA in files as a plain LoRA for the base model before quantization.

Training started at `W ~ Q + B0 A0` and ended at `Q + s B A`. The trained change is the difference::

    s B A - B0 A0  =  [s B, -B0] [A; A0]          a LoRA of rank r + r0 for W

which peft, diffusers and every LoRA server can load. On the base model it gives W + s B A - B0 A0, where the adapter
gave Q + s B A: they differ by the quantization error `W - Q - B0 A0`.

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
from peft_zoo.adapters.lq_lora.nf_linear import NF8_CONFIG, Factors, NFLinear, nf8_rank, unpack_initial_factors
from peft_zoo.common.atomic import new_folder
from peft_zoo.io import LoraAdapter, TensorInfo, TensorWriter, read_json
from peft_zoo.io.expert_names import check_plain_names
from peft_zoo.io.lora_config import write_config
from peft_zoo.io.lora_file import CONFIG_NAME, WEIGHTS_NAME, open_weights
from peft_zoo.io.lora_ranks import RankAndScale
from peft_zoo.kernels.normal_float.quantize import NFTensor, empty_nf
from peft_zoo.registration import peft_type_of


@dataclass(frozen=True)
class QuantizedMatrix:
    """Result of quantizing one layer.

    Attributes:
        name: Name of the module.
        num_weights: Number of weights of the matrix.
        config: The five values of its quantization config; None if it stayed unquantized.
        rank: Rank of its low-rank part.
        bits: Bits per weight, without the low-rank part.
        error: `|W - Q - B A| / |W|` in the Frobenius norm, weighted by importance if that was used.
    """

    name: str
    num_weights: int
    config: tuple[Any, ...] | None
    rank: int
    bits: float
    error: float


def to_lora(folder: str | Path, out_dir: str | Path) -> Path:
    """Writes the trained change of an LQ-LoRA as a LoRA of twice its rank for the unquantized base model.

    Args:
        folder: Adapter folder of `save_pretrained`, made with `keep_init` "nf8" or True. The base model is not needed.
        out_dir: A folder that does not exist or is empty; written atomically.

    Returns:
        `out_dir`. Layers that were not quantized keep their LoRA.

    Raises:
        ValueError: If the adapter is of another type, its file lacks the initial factors, or the file does not match
            its configuration.
        NotImplementedError: If stock peft would load the LoRA into other modules, as some of models with routed
            experts, or an update is not `s * B A`.

    Examples:
        >>> import tempfile
        >>> from peft import PeftModel, get_peft_model
        >>> from peft_zoo import LqLoraConfig
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = LqLoraConfig(r=4, target_modules=["0"])
        ...     get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), config).save_pretrained(f"{folder}/lq")
        ...     lora = to_lora(f"{folder}/lq", f"{folder}/lora")
        ...     model = PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(64, 32)), lora)
        >>> model.peft_config["default"].r
        8
    """
    source = Path(folder)
    config = read_json(source / CONFIG_NAME, source)
    kind = peft_type_of(LqLoraConfig).value
    if config.get("peft_type") != kind:
        raise ValueError(f"{source}: peft_type={config.get('peft_type')!r} is not {kind!r}; give an LQ-LoRA.")
    if config.get("save_base") == "none":
        raise ValueError(
            f"{source}: save_base='none' leaves out the initial factors; load the adapter onto its base, set "
            "save_base='quantized' in its configuration, and save it again."
        )
    with open_weights(source, config) as file:
        adapter = LoraAdapter(file, {**config, "peft_type": "LORA"}, NFLinear.ALL)
        check_plain_names(adapter.modules, config)
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
    return unpack_initial_factors(packed, (module.out_features, module.in_features))


def _is_quantized(adapter: LoraAdapter, name: str) -> bool:
    """Whether the base layer of a module is quantized."""
    return _key(name, "codes") in adapter.file.tensors


def _key(name: str, part: str) -> str:
    """Returns the key in the file of a tensor of a quantized layer."""
    return f"base_model.model.{name}.base_layer.{part}"


def _first_rank(adapter: LoraAdapter, name: str) -> int:
    """Validates the initial factors of a module and returns their rank."""
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
            f"{adapter.file.path}: has no initial factors of {name}; quantize with keep_init='nf8' to export a LoRA "
            "for the base model, or merge."
        )
    for part, shape in wanted.items():
        if infos[part].shape != shape:
            raise ValueError(
                f"module {name}: {part} {infos[part].shape} does not fit its LoRA, {shape} does; get the file again."
            )
    return rank
