"""Reads LoRA files without their base model: ranks and scales from the headers, factors one module at a time.

The update of every module is the matrix s B A with B `(out, R)` and A `(R, in)`:

    linear      stored A (R, in), B (out, R)                       ΔW (out, in)        = s B A
    conv        stored A (R, in, *kernel), B (out, R, 1, …)        ΔW (out, in·kernel) = s B A, kernels flattened
    embedding   stored A (R, num), B (dim, R)                      ΔW (num, dim)       = s (B A)^T

with s = alpha / R, or alpha / sqrt(R) for rsLoRA (Kalajdzievski, arXiv 2312.03732). Opening a file reads its header,
its configuration and one element for each alpha, and validates them.
"""

from __future__ import annotations

import math
import os
import reprlib
import string
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from peft_zoo.io.digest import check_digest
from peft_zoo.io.extra_keys import TRAINED_TOKENS, check_extra_key
from peft_zoo.io.header import TensorInfo
from peft_zoo.io.lora_keys import FORMATS, Role, detect_format, make_key, parse_key
from peft_zoo.io.lora_ranks import alpha_of
from peft_zoo.io.lora_settings import MAX_RANK, ModuleSettings, check_targeted, diffusers_settings, read_settings
from peft_zoo.io.safetensors import FLOATS, ClosedOnExit, TensorFile, check_finite
from peft_zoo.io.strict_json import read_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)  # dtypes of alphas in some files
_LETTERS = frozenset(string.ascii_letters + string.digits + "_.-")
_LONGEST_NAME = 1024

LayerKind = Literal["linear", "conv", "embedding"]


@dataclass(frozen=True)
class LoraModule:
    """LoRA of one module as described by header and configuration.

    Attributes:
        name: Module name in the base model, in the spelling of the file format.
        keys: Tensor names by role.
        kind: Layout of the factors.
        rank: Rank R.
        scale: Factor s of the update `s * B A`.
        shape_A: Stored shape of A.
        shape_B: Stored shape of B.
        dtype: Stored dtype of A.
    """

    name: str
    keys: dict[Role, str]
    kind: LayerKind
    rank: int
    scale: float
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]
    dtype: torch.dtype

    @property
    def key_A(self) -> str:
        """Tensor name of A."""
        return self.keys[Role.EMBEDDING_A if self.kind == "embedding" else Role.A]

    @property
    def key_B(self) -> str:
        """Tensor name of B."""
        return self.keys[Role.EMBEDDING_B if self.kind == "embedding" else Role.B]

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and columns of `B A`."""
        return self.out_features, self.in_features

    @property
    def out_features(self) -> int:
        """Rows of `B A`."""
        return self.shape_B[0]

    @property
    def in_features(self) -> int:
        """Columns of `B A`; for a convolution, input channels times kernel size."""
        return math.prod(self.shape_A[1:])


class LoraAdapter(ClosedOnExit):
    """Open LoRA file; a context manager. Created by `open_adapter`.

    Attributes:
        file: The open safetensors file.
        config: Content of `adapter_config.json`, or None for a single file.
        format: Key format, one of `lora_keys.FORMATS`.
        modules: LoRA of each module by name.
        other_keys: Names of tensors outside the LoRA (`modules_to_save`, trained tokens, biases), to be copied.
    """

    def __init__(self, file: TensorFile, config: dict[str, Any] | None, base_parts: Collection[str] = ()) -> None:
        """Validates header and configuration (None for a single file); the caller closes the file if this raises.

        `base_parts` are the names of tensors of adapted base layers that the file may contain.
        """
        self.file, self.config = file, config
        if config is not None:
            read_settings(config)  # first, so that other adapter types are refused by type and not by their keys
        self.format = detect_format(file.tensors)
        if self.format == "peft" and config is None:
            raise ValueError(f"{file.path}: its scale is in {CONFIG_NAME}; give the folder that holds both.")
        if self.format != "peft" and config is not None:
            raise ValueError(f"{file.path}: {self.format} keys in a folder with {CONFIG_NAME}; give the file itself.")
        self._configured = _configured(self.format, file.metadata, config)
        groups, self.other_keys = _group(self.format, file.tensors)
        for key in self.other_keys:
            check_extra_key(self.format, key, config, groups.keys(), base_parts)
        tokens = (config or {}).get("trainable_token_indices")
        if tokens and not any(key.endswith(TRAINED_TOKENS) for key in file.tensors):
            shown = f"trainable_token_indices={reprlib.repr(tokens)}"
            raise ValueError(f"{shown}: the weights file has no trained tokens; remove the field.")
        self.modules = {name: self._module(name, keys) for name, keys in groups.items()}
        check_targeted(config or {}, self.modules)

    def _module(self, name: str, keys: dict[Role, str]) -> LoraModule:
        """Validates and describes one module."""
        A, B = _factor_roles(name, keys)
        info_A, info_B = self.file.tensors[keys[A]], self.file.tensors[keys[B]]
        kind: LayerKind = "embedding" if A is Role.EMBEDDING_A else "linear" if len(info_A.shape) == 2 else "conv"
        _check_shapes(name, kind, info_A.shape, info_B.shape)
        _check_companions(name, keys, self.file.tensors, info_A.shape, info_B.shape, self.config)
        rank = info_A.shape[0]
        scale = self._scale(name, keys, rank)
        return LoraModule(name, keys, kind, rank, scale, info_A.shape, info_B.shape, info_A.dtype)

    def _scale(self, name: str, keys: dict[Role, str], rank: int) -> float:
        """Scale from the configuration, else from the alpha tensor, else 1 (alpha = R) as all loaders assume."""
        configured = self._configured(name)
        if configured is None:
            return self._read_alpha(keys[Role.ALPHA]) / rank if Role.ALPHA in keys else 1.0
        if Role.ALPHA in keys:
            raise ValueError(f"module {name}: an alpha in {keys[Role.ALPHA]!r} and one in the metadata; remove one.")
        if configured.rank != rank:
            raise ValueError(
                f"module {name}: config says rank {configured.rank}, file has {rank}; "
                "correct r or rank_pattern, or get both files from one save."
            )
        return configured.scale

    def _read_alpha(self, key: str) -> float:
        """Reads an alpha tensor of one element."""
        info = self.file.tensors[key]
        if info.numel != 1 or info.dtype not in FLOATS + _INTEGERS:
            raise ValueError(f"{key}: an alpha is one number, not {info.dtype} {info.shape}; train or convert again.")
        return float(self.read(key).item())

    def read(self, key: str) -> Tensor:
        """Reads one tensor by its name in the file; values that are not finite are a ValueError."""
        return self.file.read_finite(key)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Reads B and A of one module, with ΔW = `scale * B @ A` (of an embedding, its transpose).

        B `(out_features, rank)` and A `(rank, in_features)` are in the dtypes of the file.
        """
        module = self.modules[name]
        return self.read(module.key_B).flatten(1), self.read(module.key_A).flatten(1)

    def new_infos(self, name: str, rank: int, scale: float) -> dict[str, TensorInfo]:
        """Dtype and shape of the tensors that `new_tensors` returns for a new rank and scale, by tensor name."""
        module = self.modules[name]
        infos = {key: self.file.tensors[key] for key in module.keys.values()}
        infos[module.key_B] = TensorInfo(infos[module.key_B].dtype, (module.shape_B[0], rank, *module.shape_B[2:]))
        infos[module.key_A] = TensorInfo(module.dtype, (rank, *module.shape_A[1:]))
        key = self._alpha_key(module, scale)
        if key is not None:
            infos[key] = TensorInfo.of(self._alpha_tensor(module, rank, scale))
        return infos

    def new_tensors(self, name: str, B: Tensor, A: Tensor, scale: float) -> dict[str, Tensor]:
        """All tensors of a module with new B `(out_features, r)`, A `(r, in_features)` and scale, by tensor name.

        They are contiguous, in the layouts and dtypes of the file; an alpha that its dtype cannot hold becomes float32.
        The bias of B is rescaled, since loaders multiply it by the scale too, and the alpha recomputed.
        """
        module = self.modules[name]
        rank = A.shape[0]
        wanted = (module.out_features, rank), (rank, module.in_features)
        if rank < 1 or (tuple(B.shape), tuple(A.shape)) != wanted:
            raise ValueError(f"module {name}: B {tuple(B.shape)} and A {tuple(A.shape)} should be {wanted}.")
        infos, tensors = self.new_infos(name, rank, scale), dict[str, Tensor]()
        for key, factor in ((module.key_B, B), (module.key_A, A)):
            tensors[key] = check_finite(key, factor.reshape(infos[key].shape).to(infos[key].dtype).contiguous())
        alpha = self._alpha_key(module, scale)
        if alpha is not None:
            tensors[alpha] = self._alpha_tensor(module, rank, scale)
        for role, key in module.keys.items():
            if role is Role.BIAS:
                old = self.read(key)
                tensors[key] = (old.double() * (module.scale / scale)).to(old.dtype)
            elif role is Role.MAGNITUDE:
                tensors[key] = self.read(key)
        return tensors

    def _alpha_key(self, module: LoraModule, scale: float) -> str | None:
        """Name of the alpha tensor for a new scale; None if the module needs none."""
        if Role.ALPHA in module.keys:
            return module.keys[Role.ALPHA]
        if self._configured(module.name) is not None or scale == 1 or Role.ALPHA not in FORMATS[self.format].suffixes:
            return None
        return make_key(self.format, module.name, Role.ALPHA)

    def _alpha_tensor(self, module: LoraModule, rank: int, scale: float) -> Tensor:
        """Alpha tensor for a new rank and scale, in the dtype of the file if that holds the value exactly."""
        info = self.file.tensors.get(module.keys.get(Role.ALPHA, ""), TensorInfo(torch.float32, ()))
        exact = torch.full(info.shape, alpha_of(scale, rank, use_rslora=False), dtype=torch.float64)
        stored = exact.to(info.dtype)
        return stored if torch.equal(stored.double(), exact) else exact.float()

    def close(self) -> None:
        """Closes the file; no tensor can be read afterwards."""
        self.file.close()


def open_adapter(path: str | Path) -> LoraAdapter:
    """Opens a LoRA for reading, without its base model; reads no factors.

    Args:
        path: A folder saved by peft (`adapter_config.json` and `adapter_model.safetensors`), or a `.safetensors` file
            of sd-scripts or diffusers.

    Returns:
        The open adapter, a context manager.

    Raises:
        ValueError: If a file is missing or invalid; names the field, key or module and the fix.
        NotImplementedError: If it is another adapter type, or an update is not `s * B A`.
    """
    path = Path(path)
    is_folder = path.is_dir()
    config = read_json(path / CONFIG_NAME, path) if is_folder else None
    file = TensorFile(path) if config is None else open_weights(path, config)
    try:
        return LoraAdapter(file, config)
    except BaseException:
        file.close()
        raise


def open_weights(folder: Path, config: Mapping[str, Any]) -> TensorFile:
    """Opens `adapter_model.safetensors` of an adapter folder with this configuration.

    A pickle beside or instead of it is never opened. Raises a ValueError if the configuration has another checksum.
    """
    if not os.path.lexists(folder / WEIGHTS_NAME):
        pickle = next((name for name in PICKLES if os.path.lexists(folder / name)), None)
        found = f"{pickle} is a pickle and never opened, " if pickle else ""
        raise ValueError(f"{folder}: has no {WEIGHTS_NAME}; {found}save the adapter with safe_serialization=True.")
    file = TensorFile(folder / WEIGHTS_NAME, folder)
    try:
        check_digest(config, file.path)
    except BaseException:
        file.close()
        raise
    return file


def _configured(
    fmt: str, metadata: Mapping[str, str], config: Mapping[str, Any] | None
) -> Callable[[str], ModuleSettings | None]:
    """Function from a module's name to its rank, alpha and scale in the configuration; None where it has none."""
    if config is not None:
        return read_settings(config).of
    return diffusers_settings(metadata) if fmt == "diffusers_peft" else lambda module: None


def _group(fmt: str, keys: Iterable[str]) -> tuple[dict[str, dict[Role, str]], list[str]]:
    """Groups keys in format `fmt` by module and role; also returns the keys of tensors that are not part of a LoRA."""
    groups: dict[str, dict[Role, str]] = {}
    others = []
    for key in keys:
        parsed = parse_key(fmt, key)
        if parsed is None:
            others.append(key)
            continue
        module, role = parsed
        role = Role.MAGNITUDE if role is Role.MAGNITUDE_WEIGHT else role
        group = groups.setdefault(module, {})
        if role in group:
            raise ValueError(f"module {module}: {group[role]!r} and {key!r} are the same tensor; remove one.")
        group[role] = key
    return groups, others


def _factor_roles(name: str, keys: Mapping[Role, str]) -> tuple[Role, Role]:
    """Roles of the two factors of a module; raises if one is missing."""
    if not set(name) <= _LETTERS or len(name) > _LONGEST_NAME:
        raise ValueError(f"module {reprlib.repr(name)}: a name has letters, digits, '_', '-' and '.'; rename it.")
    if Role.MID in keys:
        raise NotImplementedError(f"module {name}: lora_mid, a LoRA of three factors, is not supported.")
    pairs = (Role.A, Role.B), (Role.EMBEDDING_A, Role.EMBEDDING_B)
    present = [[role for role in pair if role in keys] for pair in pairs]
    if all(present):
        raise ValueError(f"module {name}: factors of a linear layer and of an embedding; remove one pair.")
    pair, found = (pairs[1], present[1]) if present[1] else (pairs[0], present[0])
    if len(found) < 2:
        missing = [role.value for role in pair if role not in found]
        raise ValueError(f"module {name}: the file has no {' and no '.join(missing)}; it is incomplete, get it again.")
    return pair


def _check_shapes(name: str, kind: LayerKind, A: tuple[int, ...], B: tuple[int, ...]) -> None:
    """Checks that the stored shapes of A and B are those of two factors of one matrix."""
    if not 2 <= len(A) == len(B) <= 5 or (kind == "embedding" and len(A) != 2) or 0 in A + B:
        raise ValueError(f"module {name}: lora_A {A} and lora_B {B} fit no layer; export the LoRA again.")
    if kind == "conv" and A[0] != B[1] and A[0] % B[1] == 0:
        raise NotImplementedError(
            f"module {name}: lora_A {A} and lora_B {B} belong to a convolution with groups, use one without."
        )
    if A[0] != B[1]:
        raise ValueError(f"module {name}: lora_A (r={A[0]}) and lora_B (r={B[1]}) disagree; get the file again.")
    if A[0] > MAX_RANK:
        raise ValueError(f"module {name}: r={A[0]} is above {MAX_RANK}; use a LoRA of lower rank.")
    if any(size != 1 for size in B[2:]):
        raise ValueError(f"module {name}: lora_B {B} has a kernel; give lora_B a kernel of size 1.")


def _check_companions(
    name: str,
    keys: Mapping[Role, str],
    infos: Mapping[str, TensorInfo],
    A: tuple[int, ...],
    B: tuple[int, ...],
    config: Mapping[str, Any] | None,
) -> None:
    """Checks the dtypes, and that magnitude and bias fit the factors and the configuration."""
    for role, key in keys.items():
        if role is not Role.ALPHA and infos[key].dtype not in FLOATS:
            raise ValueError(f"{key}: dtype {infos[key].dtype}; save float64, float32, float16 or bfloat16.")
    sizes = {Role.BIAS: (B[0],), Role.MAGNITUDE: (B[0], A[1])}
    for role, flag in ((Role.BIAS, "lora_bias"), (Role.MAGNITUDE, "use_dora")):
        if config is not None and (config.get(flag) or False) is not (role in keys):
            state = "has" if role in keys else "lacks"
            raise ValueError(f"module {name}: {flag}={config.get(flag)!r} but it {state} {role.value}; save it again.")
        if role in keys and infos[keys[role]].numel not in sizes[role]:
            raise ValueError(f"{keys[role]}: shape {infos[keys[role]].shape} does not fit lora_B {B}; save it again.")
