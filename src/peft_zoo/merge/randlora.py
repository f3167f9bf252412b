"""RandLoRA adapters in files, from peft's format to `RandLoraConfig`'s and back, without the base model.

The two have the same update. For layer sizes D >= d, with the same λ (r, n), γ (n, d) and the same order of columns,

    ΔW = α/r · B[:D, :r n] M,    M[k n + j, :] = λ[k, j] A[k, :d] γ[j, :]

so λ and γ are copied, and what differs is where A and B come from:

* peft stores `base_model.randlora_A` (r, 1, m) and `base_model.randlora_B` (M, ⌈m/r⌉, r) over the largest sizes
  M >= m of all its layers; its versions up to 0.21 store them again beside every layer, later ones do not, and a file
  saved with `save_projection=False` has neither: whoever loads it draws them from a seed, in bfloat16 or float16 by
  the machine.
* Ours have them from a seed, bit by bit; or they are peft's, in `base_model.zoo_randlora_A` and `…_B`.

Paper: RandLoRA, arXiv:2502.00987, eq. 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from peft_zoo.adapters.randlora.config import RandLoraConfig
from peft_zoo.adapters.randlora.peft_basis import draw
from peft_zoo.common.atomic import new_folder
from peft_zoo.io import TensorFile, TensorInfo, TensorWriter, read_json
from peft_zoo.io.lora_file import CONFIG_NAME, WEIGHTS_NAME
from peft_zoo.io.lora_settings import read_settings
from peft_zoo.kernels.random_matrix.basis import unit
from peft_zoo.kernels.random_matrix.shared import BasisKey, shared_basis

__all__ = ["from_peft", "to_peft"]

OURS, THEIRS = "zoo_randlora_", "randlora_"
SAME = (
    *("r", "target_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("projection_prng_key", "randlora_dropout", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
)
SPARSE = {"peft": (False, False), "peft_sparse": (True, False), "peft_very_sparse": (False, True)}
"""Fields `sparse` and `very_sparse` of peft for each basis."""


def to_peft(folder: str | Path, out_dir: str | Path) -> Path:
    """Write a RandLoRA of ours so that peft alone loads it, with the same output up to rounding.

    Args:
        folder: Has `adapter_config.json` and `adapter_model.safetensors`, as `save_pretrained` writes them.
        out_dir: A folder that does not exist or is empty; it appears whole or not at all.

    Returns:
        `out_dir`. Besides the scales the file has A and B in full; those of ours take 4·(r·m + M·r·⌈m/r⌉) bytes.

    Raises:
        ValueError: If peft has nothing like it: several ranks, fewer bases than full rank takes, matrices that differ
            between layers, adapted parameters, trained tokens. Names the field and its value.
    """
    source = Path(folder)
    config: RandLoraConfig = _config(source, RandLoraConfig)
    for name in ("target_parameters", "trainable_token_indices"):
        config.require(not getattr(config, name), name, "peft's RandLoRA has no such thing")
    with TensorFile(source / WEIGHTS_NAME) as file:
        modules = _modules(file, OURS, config.r)
        matrices = _of_ours(file, config, modules)
        factors = _factors(config, modules)
        return _write(out_dir, _peft_config(config, sorted(modules)), file, (OURS, THEIRS), matrices, factors)


def from_peft(folder: str | Path, out_dir: str | Path, peft_basis_dtype: str | None = None) -> Path:
    """Write a RandLoRA of peft, of any version, as one of ours; the output is the same up to rounding.

    Args:
        folder: Has `adapter_config.json` and `adapter_model.safetensors`, as peft's `save_pretrained` writes them.
        out_dir: A folder that does not exist or is empty; it appears whole or not at all.
        peft_basis_dtype: `"bfloat16"` or `"float16"`, for a file without A and B: in which of the two peft drew them.

    Returns:
        `out_dir`. A and B are in the file if they were before, once.

    Raises:
        ValueError: If the file is not what its configuration says; if it has no A and B and it is not known in which
            dtype they were drawn.
    """
    source = Path(folder)
    config: peft.RandLoraConfig = _config(source, peft.RandLoraConfig)
    if config.sparse and config.very_sparse:
        raise ValueError(
            "sparse=True and very_sparse=True: choose one of them in adapter_config.json; peft took very_sparse."
        )
    basis = next(name for name, flags in SPARSE.items() if flags == (bool(config.sparse), bool(config.very_sparse)))
    with TensorFile(source / WEIGHTS_NAME) as file:
        modules = _modules(file, THEIRS, config.r)
        matrices = _of_peft(file, config.r, modules)
        drawn = matrices.get("A")
        if basis == "peft" and drawn is not None:
            peft_basis_dtype = _drawn_in(drawn) or peft_basis_dtype
        elif basis == "peft" and peft_basis_dtype is None:
            raise ValueError(
                f"{source}: written with save_projection=False, and its A and B differ by over 10 % between bfloat16 "
                "and float16, of which peft takes what the machine can; pass peft_basis_dtype='bfloat16' or 'float16', "
                "or use a checkpoint with save_projection=True."
            )
        new = RandLoraConfig(
            **{field: getattr(config, field) for field in SAME},
            randlora_alpha=config.randlora_alpha,
            bias=config.bias.replace(THEIRS, OURS),
            basis=basis,
            basis_shape=[len(matrices["B"]), matrices["A"].shape[-1]] if matrices else None,
            peft_basis_dtype=peft_basis_dtype,
            save_projection=bool(matrices),
        )
        return _write(out_dir, new, file, (THEIRS, OURS), matrices, {})


def _config(folder: Path, kind: type[Any]) -> Any:
    """The configuration in a folder, if it is of the right kind."""
    content = read_json(folder / CONFIG_NAME)
    found, wanted = content.pop("peft_type", None), kind().peft_type.value
    if found != wanted:
        raise ValueError(f"{folder}: peft_type={found!r} cannot be converted; give an adapter of type {wanted!r}.")
    known = {field.name for field in fields(kind) if field.init}
    return kind(**{name: value for name, value in content.items() if name in known})


def _peft_config(config: RandLoraConfig, modules: list[str]) -> peft.RandLoraConfig:
    """The configuration of peft for an adapter of ours with these modules."""
    given = {field: getattr(config, field) for field in SAME}
    if config.exclude_modules:  # peft's has no such field: name what is left
        given |= {"target_modules": modules, "layers_to_transform": None, "layers_pattern": None}
    alpha: Any = config.alpha  # peft's annotation says int and its layers divide it
    sparse, very_sparse = SPARSE.get(config.basis, (False, False))
    return peft.RandLoraConfig(
        **given,
        randlora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        bias=config.bias.replace(OURS, THEIRS),
        save_projection=True,
        sparse=sparse,
        very_sparse=very_sparse,
    )


def _factors(config: RandLoraConfig, modules: Iterable[str]) -> dict[str, float]:
    """What λ is multiplied by, by its new key, where `alpha_pattern` gives a module another alpha."""
    fields = {"peft_type": "LORA", "r": config.r, "lora_alpha": config.alpha, "alpha_pattern": config.alpha_pattern}
    settings = read_settings(fields)
    by_module = {module: settings.of(module).alpha / config.alpha for module in modules}
    return {f"base_model.model.{module}.{THEIRS}lambda": f for module, f in by_module.items() if f != 1}


def _modules(file: TensorFile, prefix: str, r: int) -> dict[str, int]:
    """The smaller size of each module, by its name.

    Raises:
        ValueError: If there is none, or one has not a λ of (r, ⌈d/r⌉) and a γ of (⌈d/r⌉, d).
    """
    begin, end = "base_model.model.", f".{prefix}lambda"
    modules = {}
    for key, info in file.tensors.items():
        if not (key.startswith(begin) and key.endswith(end)):
            continue
        name = key[len(begin) : -len(end)]
        gamma = file.tensors.get(f"{begin}{name}.{prefix}gamma")
        shapes = info.shape, None if gamma is None else gamma.shape
        if len(info.shape) != 2 or gamma is None or len(gamma.shape) != 2:
            raise ValueError(f"module {name}: lambda and gamma have the shapes {shapes}; get the file again.")
        d = gamma.shape[1]
        n = math.ceil(d / r)
        if shapes != ((r, n), (n, d)):
            raise ValueError(
                f"module {name}: lambda and gamma have the shapes {shapes}; peft has one r={r} and as many bases as "
                f"full rank takes, {(r, n)} and {(n, d)}. Train without rank_pattern and num_bases to go both ways."
            )
        modules[name] = d
    if not modules:
        raise ValueError(f"{file.path}: has no key that ends in {end!r}; give the folder of a RandLoRA.")
    return modules


def _of_ours(file: TensorFile, config: RandLoraConfig, modules: Mapping[str, int]) -> dict[str, Tensor]:
    """A and B of an adapter of ours in the shapes of peft."""
    stored = {name: file.read(key) for name in "AB" if (key := f"base_model.{OURS}{name}") in file.tensors}
    if stored:
        _check_matrices(stored, config.r, modules)
        return stored
    fix = "load the adapter into its model with PeftModel.from_pretrained and save it again"
    config.require(config.basis_shape is not None, "basis_shape", fix)
    largest, smallest = config.basis_shape or [0, 0]
    config.require(smallest >= max(modules.values()), "basis_shape", f"a module has {max(modules.values())}")
    if config.is_peft_basis:
        config.require(config.peft_basis_dtype is not None, "peft_basis_dtype", fix)
        seed, dtype = config.projection_prng_key, str(config.peft_basis_dtype)
        drawn = draw(config.basis, config.r, largest, smallest, seed, dtype)
        return dict(zip("AB", drawn, strict=True))
    kinds = {config.kind(d) for d in modules.values()}
    config.require(len(kinds) == 1, "basis", "layers of several sizes have several such matrices, peft has one")
    k, n = kinds.pop(), math.ceil(smallest / config.r)
    basis = shared_basis(BasisKey(config.projection_prng_key, k, "dense", torch.device("cpu")))
    basis.reserve(A=(config.r, smallest), B=(largest, config.r * n))
    A, B = basis.A[: config.r, :smallest].float() * unit(k), basis.B[:largest, : config.r * n].float() * unit(k)
    return {"A": A.view(config.r, 1, smallest), "B": B.view(largest, n, config.r)}


def _of_peft(file: TensorFile, r: int, modules: Mapping[str, int]) -> dict[str, Tensor]:
    """A and B of an adapter of peft; empty if they were not saved.

    Raises:
        ValueError: If the copies of one are not all the same, or do not fit the modules.
    """
    matrices: dict[str, Tensor] = {}
    for name in "AB":
        keys = sorted((key for key in file.tensors if key.endswith(f".{THEIRS}{name}")), key=len)
        for key in keys:
            read = file.read(key)
            if not torch.equal(matrices.setdefault(name, read), read):
                raise ValueError(f"{keys[0]!r} and {key!r} differ, and should be copies; get the file again.")
    if matrices:
        _check_matrices(matrices, r, modules)
    return matrices


def _check_matrices(matrices: Mapping[str, Tensor], r: int, modules: Mapping[str, int]) -> None:
    """Whether A and B are those of all modules, as far as a file tells."""
    if matrices.keys() != set("AB"):
        raise ValueError(f"checkpoint has randlora_{''.join(matrices)} and not the other; get the file again.")
    needed = max(modules.values())
    smallest = matrices["A"].shape[-1]
    whole = {"A": (r, 1, smallest), "B": (len(matrices["B"]), math.ceil(smallest / r), r)}
    for name, least in (("A", (r, 1, needed)), ("B", (needed, math.ceil(needed / r), r))):
        shape = tuple(matrices[name].shape)
        if shape != whole[name] or any(have < want for have, want in zip(shape, least, strict=True)):
            raise ValueError(
                f"checkpoint basis randlora_{name} has shape {shape} but layers need {least} or more; "
                "get the file again."
            )


def _drawn_in(matrix: Tensor) -> str | None:
    """The 16-bit dtype in which a matrix was drawn, if all its values are exact in one."""
    for name in ("bfloat16", "float16"):
        if torch.equal(matrix.to(getattr(torch, name)).to(matrix.dtype), matrix):
            return name
    return None


def _write(
    out_dir: str | Path,
    config: peft.PeftConfig,
    file: TensorFile,
    prefixes: tuple[str, str],
    matrices: Mapping[str, Tensor],
    factors: Mapping[str, float],
) -> Path:
    """The new folder: λ times a factor where there is one, A and B once, everything else as it was."""
    old, new = prefixes
    ready = {f"base_model.{new}{name}": matrix.contiguous() for name, matrix in matrices.items()}
    copied = {
        key.replace(f".{old}", f".{new}"): key for key in file.tensors if not key.endswith((f"{old}A", f"{old}B"))
    }
    infos = {key: TensorInfo.of(tensor) for key, tensor in ready.items()}
    infos |= {key: file.tensors[origin] for key, origin in copied.items()}
    with new_folder(out_dir) as folder:
        with TensorWriter(folder / WEIGHTS_NAME, infos, {"format": "pt"}) as writer:
            for key, tensor in ready.items():
                writer.write(key, tensor)
            for key, origin in copied.items():
                writer.write(key, file.read(origin) * factors.get(key, 1))
        config.save_pretrained(str(folder))
    return Path(out_dir)
