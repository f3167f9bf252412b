r"""Files of LyCORIS with flat names: LoHa and LoKr become those of peft, LoCon with a middle factor a plain LoRA.

    LoHa    dW = alpha / r (w1_a w1_b) * (w2_a w2_b)      entry by entry
    LoKr    dW = alpha / r kron(w1, w2)                   r of the factor that is a product; 1 if neither is
    LoCon   dW = alpha / r up mid down

LyCORIS: arXiv 2309.14859. A LoCon's middle and lower factor are multiplied in float64 and stored in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig
from peft.tuners.lokr.layer import factorization
from torch import Tensor

from peft_zoo.io import LoraAdapter
from peft_zoo.io.lora_keys import HADA, KRON, is_lycoris
from peft_zoo.io.lora_ranks import RankAndScale, rank_fields
from peft_zoo.io.lora_settings import MAX_RANK
from peft_zoo.io.safetensors import FLOATS, TensorFile
from peft_zoo.merge.base.plain_lora import PREFIX, drops
from peft_zoo.merge.formats.format import ConvertOptions, Format
from peft_zoo.merge.formats.fused import split, swap_halves
from peft_zoo.merge.formats.lora import Lora, write_folder, write_tensors
from peft_zoo.merge.formats.named import configs_of, family_of
from peft_zoo.merge.formats.names.match import Place, match_names
from peft_zoo.merge.formats.names.table import Pair

_LOCON = ("lora_down.weight", "lora_up.weight", "lora_mid.weight")
_KINDS = {"LoHa": HADA, "LoKr": KRON, "LoCon": _LOCON}
_NEEDED = {"LoHa": HADA[:4], "LoKr": (), "LoCon": _LOCON[:2]}
_DIMENSIONS = {
    **dict.fromkeys((*HADA, *KRON), (2,)),
    **dict.fromkeys(("hada_t1", "hada_t2", "lokr_t2", "lora_mid.weight"), (3, 4, 5)),
    **dict.fromkeys(("lokr_w2", "lora_down.weight", "lora_up.weight"), (2, 3, 4, 5)),
}
_AREAS = (1, 9, 4, 16, 25, 49)  # sizes of kernels that a flattened factor may have
_FACTORS = (-1, *range(2, 129))  # values of `decompose_factor` that are tried

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """LoHa or LoKr of one module.

    Attributes:
        tensors: Factors by the ends of their names.
        rank: Rank of the factors; for a LoKr of two whole factors one for which peft makes them whole.
        scale: Scale of the update.
    """

    tensors: Tensors
    rank: int
    scale: float


def _read(path: Path, folder: Path, options: ConvertOptions) -> list[str]:
    """Writes a folder of peft for each part of a file."""
    with TensorFile(path) as file:
        modules = _group(file, options.drop)
        match = match_names(modules, ["kohya"], configs_of(options), family_of(options))
        parts: dict[str, list[str]] = {}
        for name, place in match.places.items():
            parts.setdefault(place.part, []).append(name)
        for part, names in parts.items():
            kinds = {_kind(name, modules[name]): name for name in names}
            if len(kinds) > 1:
                shown = ", ".join(f"{kind} ({name})" for kind, name in kinds.items())
                raise NotImplementedError(f"{part} has {shown}; peft has one kind in an adapter, drop the others.")
            own = {name: (match.places[name], modules[name]) for name in names}
            _WRITERS[next(iter(kinds))](folder / part if len(parts) > 1 else folder, file, own)
    return []


def _group(file: TensorFile, drop: Sequence[str]) -> dict[str, dict[str, str]]:
    """Returns the keys of each module by their ends; raises for tensors that are none of a known kind."""
    modules: dict[str, dict[str, str]] = {}
    for key in file.tensors:
        name, _, end = key.partition(".")
        if drops(name, drop) or any(key.endswith(each) for each in drop):
            continue
        if end not in (*HADA, *KRON, *_LOCON, "alpha"):
            raise NotImplementedError(
                f"{key}: {end!r} of LyCORIS has no place in an adapter of peft; drop=[{'.' + end!r}] leaves it out."
            )
        modules.setdefault(name, {})[end] = key
    if not modules:
        raise ValueError(f"drop={list(drop)!r} leaves no module; leave some out of it.")
    return modules


def _kind(name: str, keys: Mapping[str, str]) -> str:
    """Returns the kind of a module, after checking that its factors are complete."""
    found = [kind for kind, ends in _KINDS.items() if not keys.keys().isdisjoint(ends)]
    if len(found) != 1:
        raise ValueError(f"module {name}: has {', '.join(found) or 'only an alpha'}; it is damaged, get it again.")
    missing = [end for end in _NEEDED[found[0]] if end not in keys]
    if missing:
        raise ValueError(f"module {name}: the file has no {missing[0]}; it is incomplete, get it again.")
    return found[0]


def _tensors(file: TensorFile, keys: Mapping[str, str]) -> tuple[Tensors, float | None]:
    """Reads the factors and the alpha of a module."""
    found: Tensors = {}
    for end, key in keys.items():
        found[end] = file.read_finite(key)
        if found[end].dtype not in FLOATS and end != "alpha":
            raise ValueError(f"{key}: dtype {found[end].dtype}; save float32, float16 or bfloat16.")
        if end != "alpha" and (found[end].dim() not in _DIMENSIONS[end] or not found[end].numel()):
            raise ValueError(f"{key}: shape {tuple(found[end].shape)} is that of no {end}; get the file again.")
    alpha = found.pop("alpha", None)
    if alpha is not None and (alpha.numel() != 1 or alpha.is_complex() or alpha.dtype == torch.bool):
        raise ValueError(
            f"{keys['alpha']}: an alpha is one number, not {alpha.dtype} {tuple(alpha.shape)}; train again."
        )
    return found, None if alpha is None else float(alpha.item())


def _check_ranks(name: str, sizes: Sequence[int]) -> int:
    """Returns the rank of factors after checking that all have it."""
    if len(set(sizes)) > 1 or not 1 <= sizes[0] <= MAX_RANK:
        raise ValueError(f"module {name}: the ranks {list(sizes)} of its factors do not fit; get the file again.")
    return sizes[0]


def _locon(file: TensorFile, name: str, keys: Mapping[str, str]) -> Lora:
    """Returns a LoCon as a plain LoRA."""
    tensors, alpha = _tensors(file, keys)
    down, up, mid = (tensors.get(end) for end in _LOCON)
    assert down is not None and up is not None
    sizes = [down.shape[0], up.flatten(1).shape[1], *(mid.shape[:2] if mid is not None else [])]
    rank = _check_ranks(name, sizes)
    scale = 1.0 if alpha is None else alpha / rank
    if mid is None:
        return Lora(up, down, scale)
    A = torch.einsum("pq...,qi->pi...", mid.double(), down.flatten(1).double()).float()
    return Lora(up.reshape(*up.shape[:2], *[1] * (A.dim() - 2)).float(), A, scale)


def _write_locon(folder: Path, file: TensorFile, own: Mapping[str, tuple[Place, Mapping[str, str]]]) -> None:
    """Writes plain LoRAs."""
    loras: dict[str, Callable[[], Lora]] = {}
    for name, (place, keys) in own.items():
        for index, model in enumerate(place.pair.models):
            loras[model] = _piece(file, name, keys, place.pair, index)
    write_folder(folder, loras)


def _piece(file: TensorFile, name: str, keys: Mapping[str, str], pair: Pair, index: int) -> Callable[[], Lora]:
    """Returns the function that reads the LoRA of one of the modules of a pair."""

    def read() -> Lora:
        lora = _locon(file, name, keys)
        if len(pair.models) > 1:
            rows = pair.rows(len(lora.B))
            zero = Lora(torch.zeros_like(lora.B[: rows[index]]), lora.A, lora.scale)
            return split(lora, rows)[index] or zero
        return replace(lora, B=swap_halves(lora.B)) if pair.is_swapped(len(lora.B), lora.A[0].numel()) else lora

    return read


def _loha(file: TensorFile, name: str, keys: Mapping[str, str], pair: Pair) -> Iterator[Update]:
    """Yields the LoHa of each module of a pair: its rows of the two factors that have rows."""
    tensors, alpha = _tensors(file, keys)
    tucker = "hada_t1" in tensors
    if tucker is not ("hada_t2" in tensors):
        raise ValueError(f"module {name}: one of hada_t1 and hada_t2 is missing; get the file again.")
    axis = 0 if tucker else 1
    sizes = [tensors[end].shape[axis if end.endswith("a") else 0] for end in HADA[:4]]
    rank = _check_ranks(name, [*sizes, *(size for end in HADA[4:] if tucker for size in tensors[end].shape[:2])])
    for one, other in (("hada_w1_a", "hada_w2_a"), ("hada_w1_b", "hada_w2_b"), ("hada_t1", "hada_t2")):
        if one in tensors and tensors[one].shape != tensors[other].shape:
            raise ValueError(f"module {name}: {one} and {other} have different shapes; get the file again.")
    scale = 1.0 if alpha is None else alpha / rank
    height = tensors["hada_w1_a"].shape[1 - axis]
    columns = tensors["hada_w1_b"].shape[1]
    rows = pair.rows(height) if len(pair.models) > 1 else [height]
    start = 0
    for count in rows:
        own = dict(tensors)
        for end in ("hada_w1_a", "hada_w2_a"):
            piece = tensors[end].narrow(1 - axis, start, count)
            if pair.is_swapped(height, columns):
                piece = swap_halves(piece.movedim(1 - axis, 0)).movedim(0, 1 - axis)
            own[end] = piece.contiguous()
        yield Update(own, rank, scale)
        start += count


def _lokr(file: TensorFile, name: str, keys: Mapping[str, str], pair: Pair) -> Iterator[Update]:
    """Yields the LoKr of a module; a Kronecker product has no rows that are one of parts."""
    if len(pair.models) > 1 or pair.swapped or pair.swapped_if_short:
        models = ", ".join(pair.models)
        raise NotImplementedError(f"{name}: the rows of a Kronecker product cannot be given to {models}; merge it.")
    tensors, alpha = _tensors(file, keys)
    for which in ("lokr_w1", "lokr_w2"):
        whole, a, b = (end in tensors for end in (which, f"{which}_a", f"{which}_b"))
        if whole is a or a is not b:
            raise ValueError(f"module {name}: {which} is neither whole nor a product of two; get the file again.")
    if "lokr_t2" in tensors and "lokr_w2_a" not in tensors:
        raise ValueError(f"module {name}: lokr_t2 beside a whole lokr_w2; get the file again.")
    ranks = [tensors[end].shape[0] for end in ("lokr_w2_b", "lokr_w1_b") if end in tensors]
    ranks += [tensors["lokr_w1_a"].shape[1]] if "lokr_w1_a" in tensors else []
    ranks += [tensors["lokr_w2_a"].shape[0 if "lokr_t2" in tensors else 1]] if "lokr_w2_a" in tensors else []
    ranks += list(tensors["lokr_t2"].shape[:2]) if "lokr_t2" in tensors else []
    if not ranks:  # both factors are whole: no rank, and alpha does not count
        largest = max(max(tensors["lokr_w1"].shape), max(tensors["lokr_w2"].shape[:2]))
        yield Update(tensors, math.ceil(largest / 2), 1.0)
    else:
        yield Update(tensors, _check_ranks(name, ranks), 1.0 if alpha is None else alpha / ranks[0])


def _write_products(folder: Path, updates: Mapping[str, Callable[[], Update]], config: Any) -> None:
    """Writes a folder of peft with LoHas or LoKrs."""
    plans: dict[str, RankAndScale] = {}

    def group(name: str, make: Callable[[], Update]) -> Callable[[], Tensors]:
        def tensors() -> Tensors:
            update = make()
            plans[name] = RankAndScale(update.rank, update.scale)
            return {f"{PREFIX}{name}.{end}": tensor for end, tensor in update.tensors.items()}

        return tensors

    folder.mkdir(exist_ok=True)
    groups = [group(*item) for item in updates.items()]
    write_tensors(folder / "adapter_model.safetensors", groups, {"format": "pt"})
    fields = rank_fields(plans)
    config.alpha = fields.pop("lora_alpha")
    for name, value in fields.items():
        setattr(config, name, value)
    config.target_modules, config.inference_mode = sorted(plans), True
    config.save_pretrained(str(folder))


def _updates(
    file: TensorFile, own: Mapping[str, tuple[Place, Mapping[str, str]]], of: Callable[..., Iterator[Update]]
) -> dict[str, Callable[[], Update]]:
    """Returns the updates of modules of the model by name, read when they are asked for."""

    def reader(name: str, keys: Mapping[str, str], pair: Pair, index: int) -> Callable[[], Update]:
        return lambda: list(of(file, name, keys, pair))[index]

    return {
        model: reader(name, keys, place.pair, index)
        for name, (place, keys) in own.items()
        for index, model in enumerate(place.pair.models)
    }


def _write_loha(folder: Path, file: TensorFile, own: Mapping[str, tuple[Place, Mapping[str, str]]]) -> None:
    """Writes LoHas."""
    tucker = any("hada_t1" in keys for _, keys in own.values())
    _write_products(folder, _updates(file, own, _loha), LoHaConfig(use_effective_conv2d=tucker))


def _write_lokr(folder: Path, file: TensorFile, own: Mapping[str, tuple[Place, Mapping[str, str]]]) -> None:
    """Writes LoKrs, with the `decompose_factor` and `decompose_both` for which peft makes factors of these shapes."""
    updates = _updates(file, own, _lokr)
    both = any("lokr_w1_a" in keys for _, keys in own.values())
    left = set(_FACTORS)
    for make in updates.values():
        update = make()
        left = {factor for factor in left if _fits(update, factor, both)}
        if not left:
            name = next(name for name, each in updates.items() if each is make)
            raise NotImplementedError(f"{name}: peft makes factors of these sizes for no decompose_factor; merge it.")
    tucker = any("lokr_t2" in keys for _, keys in own.values())
    factor = -1 if -1 in left else min(left)
    config = LoKrConfig(decompose_factor=factor, decompose_both=both, use_effective_conv2d=tucker)
    _write_products(folder, updates, config)


def _fits(update: Update, factor: int, both: bool) -> bool:
    """Whether peft makes factors of an update's shapes for a `decompose_factor`."""
    found = update.tensors
    areas: Sequence[int] = (1,)
    w1: tuple[int, ...]
    w2: tuple[int, ...]
    w1 = found["lokr_w1"].shape if "lokr_w1" in found else (len(found["lokr_w1_a"]), found["lokr_w1_b"].shape[1])
    if "lokr_w2" in found:
        w2 = found["lokr_w2"].shape[:2]
    elif "lokr_t2" in found:
        w2 = found["lokr_w2_a"].shape[1], found["lokr_w2_b"].shape[1]
    else:
        w2, areas = (len(found["lokr_w2_a"]), found["lokr_w2_b"].shape[1]), _AREAS
    for area in areas:
        columns, rest = divmod(w2[1], area)
        fits = not rest and factorization(w1[0] * w2[0], factor) == (w1[0], w2[0])
        fits = fits and factorization(w1[1] * columns, factor) == (w1[1], columns)
        whole1 = not (both and update.rank < max(w1) / 2)
        whole2 = update.rank >= max(w2[0], columns) / 2
        if fits and whole1 is ("lokr_w1" in found) and whole2 is ("lokr_w2" in found):
            return True
    return False


_WRITERS = {"LoHa": _write_loha, "LoKr": _write_lokr, "LoCon": _write_locon}


def _write(adapters: Mapping[str, LoraAdapter], target: Path, options: ConvertOptions) -> list[str]:
    """Raises: what peft trained as LoRA is written for the same programs by the format kohya."""
    raise NotImplementedError("to='lycoris': programs that read LyCORIS read LoRAs of to='kohya'; use that.")


def _owns(path: Path) -> bool:
    """Whether a file has keys of LyCORIS that no LoRA has."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with TensorFile(path) as file:
        return is_lycoris(file.tensors)


FORMAT = Format("lycoris", "LyCORIS; is only read", ".safetensors", _write, _read, _owns)
