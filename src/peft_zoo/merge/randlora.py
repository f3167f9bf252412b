"""Converts RandLoRA adapter files between peft's format and that of `RandLoraConfig`, without the base model.

Both formats have the same update. For layer sizes D >= d::

    ΔW = α/r · B[:D, :r n] M,    M[k n + j, :] = λ[k, j] A[k, :d] γ[j, :]

λ (r, n) and γ (n, d) are copied. The formats differ in the random matrices A and B:

* peft stores `base_model.randlora_A` (r, 1, m) and `base_model.randlora_B` (M, ⌈m/r⌉, r) for the largest sizes M >= m
  of all its layers. Versions up to 0.21 store further copies for every layer. With `save_projection=False` neither is
  stored; both are drawn from a seed on loading, in bfloat16 or float16 depending on the machine.
* `RandLoraConfig` computes them from a seed, or stores peft's as `base_model.zoo_randlora_A` and `…_B`.

Paper: RandLoRA, arXiv:2502.00987, eq. 4.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from peft_zoo.adapters.base.source import check_literal, check_numbers
from peft_zoo.adapters.randlora.config import RandLoraConfig
from peft_zoo.adapters.randlora.peft_basis import draw
from peft_zoo.common.atomic import new_folder
from peft_zoo.common.checks import check, check_int, is_number
from peft_zoo.io import TensorFile, TensorInfo, TensorWriter, read_json
from peft_zoo.io.extra_keys import is_named
from peft_zoo.io.lora_file import CONFIG_NAME, WEIGHTS_NAME, open_weights
from peft_zoo.io.lora_settings import MAX_RANK, check_names, check_present, check_targeted, read_settings
from peft_zoo.io.safetensors import FLOATS
from peft_zoo.kernels.random_matrix.basis import unit
from peft_zoo.kernels.random_matrix.shared import BasisKey, shared_basis

OURS, THEIRS = "zoo_randlora_", "randlora_"
SAME = (
    *("r", "target_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("projection_prng_key", "randlora_dropout", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
)
LARGEST_BASIS = 1 << 28
"""Limit on the number of random values that are computed from a configuration; those of a 70B model fit."""
SPARSE = {"peft": (False, False), "peft_sparse": (True, False), "peft_very_sparse": (False, True)}
"""Values of peft's fields `sparse` and `very_sparse`, by basis."""


def to_peft(folder: str | Path, out_dir: str | Path) -> Path:
    """Converts an adapter of `RandLoraConfig` to peft's own RandLoRA, with the same output up to rounding.

    Args:
        folder: Adapter folder with `adapter_config.json` and `adapter_model.safetensors`.
        out_dir: Folder to write, absent or empty; it appears complete or not at all.

    Returns:
        `out_dir`. The file contains the scales, and A and B in 4·(r·m + M·r·⌈m/r⌉) bytes.

    Raises:
        ValueError: If peft does not support a setting: several ranks, `num_bases`, matrices that differ between layers,
            `target_parameters`, `trainable_token_indices`. Names the field and its value.

    Examples:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from peft import get_peft_model
        >>> from peft_zoo.randlora import RandLoraConfig, to_peft
        >>> base = torch.nn.Sequential(torch.nn.Linear(16, 8))
        >>> model = get_peft_model(base, RandLoraConfig(r=4, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(f"{folder}/ours")
        ...     files = sorted(path.name for path in to_peft(f"{folder}/ours", f"{folder}/peft").iterdir())
        >>> files
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    source = Path(folder)
    config: RandLoraConfig = _config(source, RandLoraConfig)
    for name in ("target_parameters", "trainable_token_indices"):
        config.require(not getattr(config, name), name, "peft's RandLoRA does not support it")
    with open_weights(source, vars(config)) as file:
        modules = _modules(file, OURS, config.r)
        _check_keys(file, OURS, config, modules)
        check_targeted(_lists(config), modules)
        matrices = _of_ours(file, config, modules)
        factors = _factors(config, modules)
        return _write(out_dir, _peft_config(config, sorted(modules)), file, (OURS, THEIRS), matrices, factors)


def from_peft(folder: str | Path, out_dir: str | Path, peft_basis_dtype: str | None = None) -> Path:
    """Converts an adapter of peft's RandLoRA, of any version, to `RandLoraConfig`, with the same output up to rounding.

    Args:
        folder: Adapter folder with `adapter_config.json` and `adapter_model.safetensors`.
        out_dir: Folder to write, absent or empty; it appears complete or not at all.
        peft_basis_dtype: Dtype in which peft drew A and B, `"bfloat16"` or `"float16"`; required only if the file does
            not contain them. Default None.

    Returns:
        `out_dir`. The file contains A and B once if the original did.

    Raises:
        ValueError: If the file does not match its configuration, or `peft_basis_dtype` is required.

    Examples:
        >>> import peft, tempfile, torch
        >>> from peft_zoo.randlora import RandLoraConfig, from_peft
        >>> base = torch.nn.Sequential(torch.nn.Linear(16, 8))
        >>> model = peft.get_peft_model(base, peft.RandLoraConfig(r=4, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(f"{folder}/peft")
        ...     config = RandLoraConfig.from_pretrained(from_peft(f"{folder}/peft", f"{folder}/ours"))
        >>> config.basis
        'peft'
    """
    source = Path(folder)
    config: peft.RandLoraConfig = _config(source, peft.RandLoraConfig)
    if config.sparse and config.very_sparse:
        raise ValueError(
            "adapter_config.json: sparse=True and very_sparse=True; set one of them to false (peft used very_sparse)."
        )
    basis = next(name for name, flags in SPARSE.items() if flags == (bool(config.sparse), bool(config.very_sparse)))
    with open_weights(source, vars(config)) as file:
        modules = _modules(file, THEIRS, config.r)
        _check_keys(file, THEIRS, config, modules)
        check_targeted(_lists(config), modules)
        matrices = _of_peft(file, config.r, modules)
        drawn = matrices.get("A")
        if basis == "peft" and drawn is not None:
            peft_basis_dtype = _drawn_in(drawn) or peft_basis_dtype
        elif basis == "peft" and peft_basis_dtype is None:
            raise ValueError(
                f"{source}: save_projection=False, and the matrices drawn in bfloat16 and float16 differ by over 10 %; "
                "pass peft_basis_dtype='bfloat16' or 'float16', whichever the training machine used."
            )
        new = RandLoraConfig(
            **{**{field: getattr(config, field) for field in SAME}, **_exact_targets(modules)},
            exclude_modules=None,
            randlora_alpha=config.randlora_alpha,
            bias=config.bias.replace(THEIRS, OURS),
            basis=basis,
            basis_shape=[len(matrices["B"]), matrices["A"].shape[-1]] if matrices else None,
            peft_basis_dtype=peft_basis_dtype,
            save_projection=bool(matrices),
        )
        return _write(out_dir, new, file, (THEIRS, OURS), matrices, {})


def _lists(config: Any) -> dict[str, Any]:
    """Returns the fields of a configuration as a file has them: lists instead of sets."""
    return {name: list(value) if isinstance(value, set) else value for name, value in vars(config).items()}


def _config(folder: Path, kind: type[Any]) -> Any:
    """Reads the configuration in a folder; raises if it is not of the class `kind`."""
    content = read_json(folder / CONFIG_NAME, folder)
    found, wanted = content.pop("peft_type", None), kind().peft_type.value
    if found != wanted:
        raise ValueError(f"{folder}: peft_type={found!r} cannot be converted; give an adapter of type {wanted!r}.")
    check_present(content, ("r", "randlora_alpha", "projection_prng_key"))
    check_int("r", content["r"], 1, MAX_RANK)
    check_names(content)
    patterns = {name: content.get(name) for name in ("rank_pattern", "alpha_pattern")}
    check_literal(patterns, lambda: ())
    known = {field.name for field in fields(kind) if field.init}
    try:
        made = kind(**{name: value for name, value in content.items() if name in known})
    except (AttributeError, OverflowError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_NAME}: a field has a value of a wrong type: {error}.") from error
    check_numbers(made)
    check(isinstance(made.bias, str), "bias", made.bias, "use 'none', 'all' or the name of a type and '_only'")
    if kind is peft.RandLoraConfig:
        check(is_number(made.randlora_alpha), "randlora_alpha", made.randlora_alpha, "use a number")
    return made


def _peft_config(config: RandLoraConfig, modules: list[str]) -> peft.RandLoraConfig:
    """Returns peft's configuration for an adapter with these modules."""
    given = {**{field: getattr(config, field) for field in SAME}, **_exact_targets(modules)}
    alpha: Any = config.alpha  # annotated as int, but peft's layers divide it
    sparse, very_sparse = SPARSE.get(config.basis, (False, False))
    return peft.RandLoraConfig(
        **given,
        randlora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        bias=config.bias.replace(OURS, THEIRS),
        save_projection=True,
        sparse=sparse,
        very_sparse=very_sparse,
    )


def _exact_targets(modules: Iterable[str]) -> dict[str, Any]:
    """Returns the fields that name exactly these modules: expressions of a file are neither run nor carried on."""
    return {"target_modules": sorted(modules), "layers_to_transform": None, "layers_pattern": None}


def _check_keys(file: TensorFile, prefix: str, config: Any, modules: Iterable[str]) -> None:
    """Raises a ValueError that names the nearest key if a tensor is not one of the adapter, or no floating-point."""
    names = set(modules)
    own = {f"base_model.model.{name}.{prefix}{part}" for name in names for part in ("lambda", "gamma")}
    shared = {f"base_model.{prefix}{part}" for part in "AB"}
    copies = {f"base_model.model.{name}.{prefix}{part}" for name in names for part in "AB"}
    begin, fields = "base_model.model.", config.to_dict()
    for key, info in file.tensors.items():
        if key in own or key in shared or key in copies:
            if info.dtype not in FLOATS:
                raise ValueError(f"{key}: dtype {info.dtype}; save float64, float32, float16 or bfloat16.")
        elif not (key.startswith(begin) and is_named(key.removeprefix(begin), fields, names)):
            known = sorted(own | shared)[:200]
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0] if len(key) <= 256 else known[0]
            raise ValueError(f"unknown key {key!r}; the nearest known one is {nearest!r}: remove it.")


def _factors(config: RandLoraConfig, modules: Iterable[str]) -> dict[str, float]:
    """Returns the factors of λ, by new key, of modules with an alpha from `alpha_pattern`."""
    fields = {"peft_type": "LORA", "r": config.r, "lora_alpha": config.alpha, "alpha_pattern": config.alpha_pattern}
    settings = read_settings(fields)
    by_module = {module: settings.of(module).alpha / config.alpha for module in modules}
    return {f"base_model.model.{module}.{THEIRS}lambda": f for module, f in by_module.items() if f != 1}


def _modules(file: TensorFile, prefix: str, r: int) -> dict[str, int]:
    """Returns the smaller size d of each module by name; λ must be (r, ⌈d/r⌉) and γ (⌈d/r⌉, d)."""
    begin, end = "base_model.model.", f".{prefix}lambda"
    modules = {}
    for key, info in file.tensors.items():
        if not (key.startswith(begin) and key.endswith(end)):
            continue
        name = key[len(begin) : -len(end)]
        gamma = file.tensors.get(f"{begin}{name}.{prefix}gamma")
        shapes = info.shape, None if gamma is None else gamma.shape
        if len(info.shape) != 2 or gamma is None or len(gamma.shape) != 2:
            raise ValueError(f"module {name}: lambda and gamma have shapes {shapes}; use another copy of the file.")
        d = gamma.shape[1]
        n = math.ceil(d / r)
        if shapes != ((r, n), (n, d)):
            raise ValueError(
                f"module {name}: lambda and gamma have shapes {shapes}; peft supports only {(r, n)} and {(n, d)}, for "
                "one r and full rank. Train without rank_pattern and num_bases to convert."
            )
        modules[name] = d
    if not modules:
        raise ValueError(f"{file.path}: no key ends in {end!r}; give the folder of a RandLoRA adapter.")
    return modules


def _of_ours(file: TensorFile, config: RandLoraConfig, modules: Mapping[str, int]) -> dict[str, Tensor]:
    """Returns A and B of an adapter of `RandLoraConfig` in peft's shapes, by name."""
    stored = {name: file.read_finite(key) for name in "AB" if (key := f"base_model.{OURS}{name}") in file.tensors}
    if stored:
        _check_matrices(stored, config.r, modules)
        return stored
    fix = "load the adapter with PeftModel.from_pretrained and save it again"
    config.require(config.basis_shape is not None, "basis_shape", fix)
    largest, smallest = config.basis_shape or [0, 0]
    config.require(smallest >= max(modules.values()), "basis_shape", f"a module has the size {max(modules.values())}")
    size = (largest + 1) * (smallest + config.r)
    config.require(
        size <= LARGEST_BASIS, "basis_shape", f"peft would store {size} random numbers, {LARGEST_BASIS} at most"
    )
    if config.is_peft_basis:
        config.require(config.peft_basis_dtype is not None, "peft_basis_dtype", fix)
        seed, dtype = config.projection_prng_key, str(config.peft_basis_dtype)
        drawn = draw(config.basis, config.r, largest, smallest, seed, dtype)
        return dict(zip("AB", drawn, strict=True))
    kinds = {config.kind(d) for d in modules.values()}
    config.require(len(kinds) == 1, "basis", "layers of several sizes use several matrices, peft one")
    k, n = kinds.pop(), math.ceil(smallest / config.r)
    basis = shared_basis(BasisKey(config.projection_prng_key, k, "dense", torch.device("cpu")))
    basis.reserve(A=(config.r, smallest), B=(largest, config.r * n))
    rows = basis.covering(config.r) if config.cover_features else basis.A
    A, B = rows[: config.r, :smallest].float() * unit(k), basis.B[:largest, : config.r * n].float() * unit(k)
    return {"A": A.view(config.r, 1, smallest), "B": B.view(largest, n, config.r)}


def _of_peft(file: TensorFile, r: int, modules: Mapping[str, int]) -> dict[str, Tensor]:
    """Returns A and B of an adapter of peft by name, whose copies must be equal; empty if they were not saved."""
    matrices: dict[str, Tensor] = {}
    for name in "AB":
        keys = sorted((key for key in file.tensors if key.endswith(f".{THEIRS}{name}")), key=len)
        for key in keys:
            read = file.read_finite(key)
            if not torch.equal(matrices.setdefault(name, read), read):
                raise ValueError(f"{keys[0]!r} and {key!r} should be copies but differ; use another copy of the file.")
    if matrices:
        _check_matrices(matrices, r, modules)
    return matrices


def _check_matrices(matrices: Mapping[str, Tensor], r: int, modules: Mapping[str, int]) -> None:
    """Raises a ValueError unless A and B have the shapes that the modules need."""
    if matrices.keys() != set("AB"):
        raise ValueError(f"the file contains randlora_{''.join(matrices)} only; use another copy with A and B.")
    needed = max(modules.values())
    smallest = matrices["A"].shape[-1]
    whole = {"A": (r, 1, smallest), "B": (len(matrices["B"]), math.ceil(smallest / r), r)}
    for name, least in (("A", (r, 1, needed)), ("B", (needed, math.ceil(needed / r), r))):
        shape = tuple(matrices[name].shape)
        if shape != whole[name] or any(have < want for have, want in zip(shape, least, strict=True)):
            raise ValueError(
                f"randlora_{name} has shape {shape}, but the layers need {least} or more; use another copy of the file."
            )


def _drawn_in(matrix: Tensor) -> str | None:
    """Returns the name of the 16-bit dtype that represents all values exactly, or None."""
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
    """Writes the new folder: A and B once, and all other tensors of the file, times `factors` by their new key."""
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
                writer.write(key, file.read_finite(origin) * factors.get(key, 1))
        config.save_pretrained(str(folder))
    return Path(out_dir)
