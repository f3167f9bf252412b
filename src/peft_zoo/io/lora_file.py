"""A LoRA in a file, without its base model: which modules it has, and their factors one module at a time.

Whatever the layer, a module's update is the matrix s B A with B `(out, R)` and A `(R, in)`:

    linear      stored A (R, in), B (out, R)                       ΔW (out, in)        = s B A
    conv        stored A (R, in, *kernel), B (out, R, 1, …)        ΔW (out, in·kernel) = s B A, kernels flattened
    embedding   stored A (R, num), B (dim, R)                      ΔW (num, dim)       = s (B A)^T

with s = alpha / R, or alpha / sqrt(R) for rsLoRA (Kalajdzievski, arXiv 2312.03732). Opening a file reads its header,
its configuration and one number for each alpha; everything that can be known from them is checked there.
"""

from __future__ import annotations

import math
import reprlib
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from peft_zoo.io.lora_keys import Role, detect_format, is_lora_key, nearest_key, parse_key
from peft_zoo.io.lora_settings import MAX_RANK, ModuleSettings, diffusers_settings, read_settings
from peft_zoo.io.safetensors import TensorFile, TensorInfo, read_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)  # an alpha may be one
_LETTERS = frozenset(string.ascii_letters + string.digits + "_.-")
_LONGEST_NAME = 1024

Kind = Literal["linear", "conv", "embedding"]


@dataclass(frozen=True)
class LoraModule:
    """The LoRA of one module, as the header describes it.

    Attributes:
        name: Path of the module in the base model, as its format writes it.
        keys: The names of its tensors by role.
        kind: Which of the three layouts its factors have.
        rank: R.
        alpha: Before it is divided by the rank.
        scale: s.
        shape_A: As stored.
        shape_B: As stored.
        dtype: Of the stored A.
    """

    name: str
    keys: dict[Role, str]
    kind: Kind
    rank: int
    alpha: float
    scale: float
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]
    dtype: torch.dtype

    @property
    def key_A(self) -> str:
        """The name of A in the file."""
        return self.keys[Role.EMBEDDING_A if self.kind == "embedding" else Role.A]

    @property
    def key_B(self) -> str:
        """The name of B in the file."""
        return self.keys[Role.EMBEDDING_B if self.kind == "embedding" else Role.B]

    @property
    def out_features(self) -> int:
        """Rows of B A."""
        return self.shape_B[0]

    @property
    def in_features(self) -> int:
        """Columns of B A; for a convolution, input channels times size of the kernel."""
        return math.prod(self.shape_A[1:])


class LoraAdapter:
    """A LoRA in a file that is open; a context manager that closes it. Made by `open_adapter`.

    Attributes:
        file: The tensors.
        config: The content of `adapter_config.json`, or None for a single file.
        format: A key of `keys.FORMATS`.
        modules: The LoRA of each module, by name.
        other_keys: Tensors that belong to no LoRA (`modules_to_save`, trained tokens, biases): tools copy them.
    """

    def __init__(self, file: TensorFile, config: dict[str, Any] | None) -> None:
        """Check everything that header and configuration tell.

        Args:
            file: Closed by the caller if this raises.
            config: As the attribute.

        Raises:
            ValueError: If something is wrong; names the field, key or module.
            NotImplementedError: If this LoRA is of a kind that two factors a module do not describe.
        """
        self.file, self.config = file, config
        if config is not None:
            read_settings(config)  # another kind of adapter is named as such, whatever its keys
        self.format = detect_format(file.tensors)
        if self.format == "peft" and config is None:
            raise ValueError(f"{file.path}: its scale is in {CONFIG_NAME}; give the folder that holds both.")
        if self.format != "peft" and config is not None:
            raise ValueError(f"{file.path}: {self.format} keys beside an {CONFIG_NAME}; give the file itself.")
        self._configured = _configured(self.format, file.metadata, config)
        groups, self.other_keys = _group(self.format, file.tensors)
        self.modules = {name: self._module(name, keys) for name, keys in groups.items()}

    def _module(self, name: str, keys: dict[Role, str]) -> LoraModule:
        """Describe and check one module."""
        A, B = _factor_roles(name, keys)
        info_A, info_B = self.file.tensors[keys[A]], self.file.tensors[keys[B]]
        kind: Kind = "embedding" if A is Role.EMBEDDING_A else "linear" if len(info_A.shape) == 2 else "conv"
        _check_shapes(name, kind, info_A.shape, info_B.shape)
        _check_companions(name, keys, self.file.tensors, info_A.shape, info_B.shape, self.config)
        rank = info_A.shape[0]
        alpha, scale = self._alpha_and_scale(name, keys, rank)
        return LoraModule(name, keys, kind, rank, alpha, scale, info_A.shape, info_B.shape, info_A.dtype)

    def _alpha_and_scale(self, name: str, keys: dict[Role, str], rank: int) -> tuple[float, float]:
        """From the configuration, else from the module's own tensor, else alpha = R, as every loader assumes."""
        configured = self._configured(name)
        if configured is None:
            alpha = self._read_alpha(keys[Role.ALPHA]) if Role.ALPHA in keys else float(rank)
            return alpha, alpha / rank
        if Role.ALPHA in keys:
            raise ValueError(f"module {name}: an alpha in {keys[Role.ALPHA]!r} and one in the metadata; remove one.")
        if configured.rank != rank:
            raise ValueError(
                f"module {name}: config says rank {configured.rank}, file has {rank}; "
                "correct r or rank_pattern, or get both files from one save."
            )
        return configured.alpha, configured.scale

    def _read_alpha(self, key: str) -> float:
        """The number in a tensor with one element."""
        info = self.file.tensors[key]
        if info.numel != 1 or info.dtype not in FLOATS + _INTEGERS:
            raise ValueError(f"{key}: an alpha is one number, not {info.dtype} {info.shape}; train or convert again.")
        return float(self.read(key).item())

    def read(self, key: str) -> Tensor:
        """One tensor of the file, by its key there, as it is stored.

        Raises:
            KeyError: If there is no such tensor.
            ValueError: If it has values that are not finite.
        """
        return _finite(key, self.file.read(key))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """B and A of one module, read now, with ΔW = `scale * B @ A` (of an embedding, its transpose).

        Args:
            name: A key of `modules`.

        Returns:
            B `(out_features, rank)` and A `(rank, in_features)`, in the dtypes of the file.

        Raises:
            KeyError: If there is no such module.
            ValueError: If they have values that are not finite.
        """
        module = self.modules[name]
        return self.read(module.key_B).flatten(1), self.read(module.key_A).flatten(1)

    def restored_infos(self, name: str, rank: int) -> dict[str, TensorInfo]:
        """What `restore` gives for a module of another rank: dtype and shape by key, B first.

        Args:
            name: A key of `modules`.
            rank: The new rank, positive.
        """
        module = self.modules[name]
        shape_B = (module.shape_B[0], rank, *module.shape_B[2:])
        return {
            module.key_B: TensorInfo(self.file.tensors[module.key_B].dtype, shape_B),
            module.key_A: TensorInfo(module.dtype, (rank, *module.shape_A[1:])),
        }

    def restore(self, name: str, B: Tensor, A: Tensor) -> dict[str, Tensor]:
        """New factors of a module in the layout, the dtypes and under the keys of the old ones, contiguous.

        The other tensors of the module stay as they are, but two of them depend on what the caller does to the scale s:
        an alpha (`Role.ALPHA`), and the bias of B (`Role.BIAS`), which is also multiplied by s.

        Args:
            name: A key of `modules`.
            B: `(out_features, r)`.
            A: `(r, in_features)`.

        Raises:
            KeyError: If there is no such module.
            ValueError: If a shape does not fit, or a value is not finite in the dtype of the file.
        """
        module = self.modules[name]
        rank = A.shape[0]
        wanted = (module.out_features, rank), (rank, module.in_features)
        if rank < 1 or (tuple(B.shape), tuple(A.shape)) != wanted:
            raise ValueError(f"module {name}: B {tuple(B.shape)} and A {tuple(A.shape)} should be {wanted}.")
        infos = self.restored_infos(name, rank)
        return {
            key: _finite(key, factor.reshape(info.shape).to(info.dtype).contiguous())
            for (key, info), factor in zip(infos.items(), (B, A), strict=True)
        }

    def close(self) -> None:
        """Close the file; no tensor can be read after it."""
        self.file.close()

    def __enter__(self) -> LoraAdapter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_adapter(path: str | Path) -> LoraAdapter:
    """Open a LoRA for reading, without its base model.

    Nothing of a tensor's size is allocated; `LoraAdapter.factors` reads one module.

    Args:
        path: A folder that peft saved (`adapter_config.json` and `adapter_model.safetensors`), or a `.safetensors` file
            of sd-scripts or diffusers.

    Returns:
        The adapter; close it, or use it in a `with`.

    Raises:
        ValueError: If the files are not what they should be; names the field, key or module and the fix.
        NotImplementedError: If it is another kind of adapter, or a LoRA whose updates are not plain products.
    """
    path = Path(path)
    is_folder = path.is_dir()
    config = read_json(path / CONFIG_NAME) if is_folder else None
    if is_folder and not (path / WEIGHTS_NAME).exists():
        raise ValueError(f"{path}: has no {WEIGHTS_NAME}; save with safe_serialization=True, pickles are never opened.")
    file = TensorFile(path / WEIGHTS_NAME if is_folder else path)
    try:
        return LoraAdapter(file, config)
    except BaseException:
        file.close()
        raise


def _configured(
    fmt: str, metadata: Mapping[str, str], config: Mapping[str, Any] | None
) -> Callable[[str], ModuleSettings | None]:
    """What is said of a module's rank and scale outside its tensors."""
    if config is not None:
        return read_settings(config).of
    return diffusers_settings(metadata) if fmt == "diffusers_peft" else lambda module: None


def _group(fmt: str, keys: Iterable[str]) -> tuple[dict[str, dict[Role, str]], list[str]]:
    """Keys by module and role, and those that belong to no LoRA."""
    groups: dict[str, dict[Role, str]] = {}
    others = []
    for key in keys:
        parsed = parse_key(fmt, key)
        if parsed is None:
            if is_lora_key(key):
                raise ValueError(f"unknown key {key!r}; the nearest known one is {nearest_key(fmt, key)!r}.")
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
    """The roles of the two factors of a module, both of which are there."""
    if not set(name) <= _LETTERS or len(name) > _LONGEST_NAME:
        raise ValueError(f"module {reprlib.repr(name)}: a name has letters, digits, '_', '-' and '.'; rename it.")
    if Role.MID in keys:
        raise NotImplementedError(f"module {name}: lora_mid, a LoRA of three factors, is not supported.")
    pairs = (Role.A, Role.B), (Role.EMBEDDING_A, Role.EMBEDDING_B)
    there = [[role for role in pair if role in keys] for pair in pairs]
    if all(there):
        raise ValueError(f"module {name}: factors of a linear layer and of an embedding; remove one pair.")
    pair, found = (pairs[1], there[1]) if there[1] else (pairs[0], there[0])
    if len(found) < 2:
        missing = [role.value for role in pair if role not in found]
        raise ValueError(f"module {name}: the file has no {' and no '.join(missing)}; it is incomplete, get it again.")
    return pair


def _check_shapes(name: str, kind: Kind, A: tuple[int, ...], B: tuple[int, ...]) -> None:
    """Whether the stored shapes are those of two factors of one matrix."""
    if not 2 <= len(A) == len(B) <= 5 or (kind == "embedding" and len(A) != 2) or 0 in A + B:
        raise ValueError(f"module {name}: lora_A {A} and lora_B {B} are not the factors of a layer.")
    if kind == "conv" and A[0] != B[1] and A[0] % B[1] == 0:
        raise NotImplementedError(
            f"module {name}: lora_A {A} and lora_B {B} belong to a convolution with groups: no plain product."
        )
    if A[0] != B[1]:
        raise ValueError(f"module {name}: lora_A (r={A[0]}) and lora_B (r={B[1]}) disagree; get the file again.")
    if A[0] > MAX_RANK:
        raise ValueError(f"module {name}: r={A[0]} is above {MAX_RANK}; this is no low rank.")
    if any(size != 1 for size in B[2:]):
        raise ValueError(f"module {name}: lora_B {B} has a kernel; only lora_A may have one.")


def _check_companions(
    name: str,
    keys: Mapping[Role, str],
    infos: Mapping[str, TensorInfo],
    A: tuple[int, ...],
    B: tuple[int, ...],
    config: Mapping[str, Any] | None,
) -> None:
    """Whether dtypes can be computed with, and magnitude and bias fit the factors and the configuration."""
    for role, key in keys.items():
        if role is not Role.ALPHA and infos[key].dtype not in FLOATS:
            raise ValueError(f"{key}: dtype {infos[key].dtype}; a LoRA is float64, float32, float16 or bfloat16.")
    sizes = {Role.BIAS: (B[0],), Role.MAGNITUDE: (B[0], A[1])}
    for role, flag in ((Role.BIAS, "lora_bias"), (Role.MAGNITUDE, "use_dora")):
        if config is not None and (config.get(flag) or False) is not (role in keys):
            state = "has" if role in keys else "lacks"
            raise ValueError(f"module {name}: {flag}={config.get(flag)!r} but it {state} {role.value}; save it again.")
        if role in keys and infos[keys[role]].numel not in sizes[role]:
            raise ValueError(f"{keys[role]}: shape {infos[keys[role]].shape} does not fit lora_B {B}.")


def _finite(key: str, tensor: Tensor) -> Tensor:
    """The tensor itself, if no value is NaN or infinite; needs no memory."""
    if tensor.dtype in FLOATS and tensor.numel():
        least, most = torch.aminmax(tensor)  # NaN if there is one
        if not math.isfinite(least.item()) or not math.isfinite(most.item()):
            raise ValueError(f"non-finite values in {key}; train or download it again.")
    return tensor
