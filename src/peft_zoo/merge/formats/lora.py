"""LoRAs of single modules on their way from one format to another, and the folders of peft they come from and go to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_zoo.io import LoraAdapter, Role, TensorInfo, TensorWriter, make_key
from peft_zoo.io.lora_config import write_config
from peft_zoo.io.lora_file import WEIGHTS_NAME
from peft_zoo.io.lora_ranks import RankAndScale, alpha_of
from peft_zoo.merge.base.plain_lora import drops, file_extras


@dataclass(frozen=True)
class Lora:
    """LoRA of one module as it is stored: the update is `scale * B @ A`.

    Attributes:
        B: Factor `(out, r)`, `(out, r, 1, …)` for a convolution.
        A: Factor `(r, in)`, `(r, in, *kernel)` for a convolution.
        scale: Scale of the product.
        magnitude: Magnitudes of DoRA, `(out,)`; None for a plain LoRA.
    """

    B: Tensor
    A: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return len(self.A)

    def alpha(self) -> Tensor:
        """Returns `scale * rank` as a scalar, in the dtype of A if that holds it exactly, else in float32."""
        exact = torch.tensor(exact_alpha(self.scale, self.rank), dtype=torch.float64)
        stored = exact.to(self.A.dtype)
        return stored if stored.double() == exact else exact.float()

    def tensors(self, fmt: str, name: str, alpha: bool = True) -> dict[str, Tensor]:
        """Returns the tensors of a module by their keys in a format of `lora_keys.FORMATS`."""
        found = {make_key(fmt, name, Role.A): self.A, make_key(fmt, name, Role.B): self.B}
        if alpha:
            found[make_key(fmt, name, Role.ALPHA)] = self.alpha()
        if self.magnitude is not None:
            found[make_key(fmt, name, Role.MAGNITUDE)] = self.magnitude.reshape(self._magnitude_shape(fmt))
        return found

    def _magnitude_shape(self, fmt: str) -> list[int]:
        """Returns the shape of stored magnitudes: a column of the weight, except that peft moves the axis of layers."""
        kernel = [1] * (self.A.dim() - 2)
        if fmt == "kohya":
            return [-1, 1, *kernel]
        return [1, -1, *kernel] if kernel else [-1]


Loras = Mapping[str, Callable[[], Lora]]
"""LoRAs by name, read or computed when they are asked for, so that one is in memory."""


def exact_alpha(scale: float, rank: int) -> float:
    """Returns the alpha with `alpha / rank == scale`: a number of 32 bits if there is one, as files have it."""
    alpha = float(alpha_of(scale, rank, use_rslora=False))
    short = torch.tensor(alpha, dtype=torch.float32).item()
    return short if short / rank == scale else alpha


def read_lora(adapter: LoraAdapter, name: str, drop: Sequence[str]) -> Lora:
    """Reads the LoRA of a module, without magnitudes if `drop` names them and without what `check_extras` refuses."""
    module = adapter.modules[name]
    magnitude = module.keys.get(Role.MAGNITUDE) if "magnitude" not in drop else None
    return Lora(
        adapter.read(module.key_B),
        adapter.read(module.key_A),
        module.scale,
        adapter.read(magnitude).flatten() if magnitude is not None else None,
    )


def check_extras(adapter: LoraAdapter, drop: Sequence[str], form: str, holds: Sequence[str] = ()) -> list[str]:
    """Returns the modules of a folder of peft that are kept; raises a ValueError for what a format cannot hold.

    Args:
        adapter: The open folder.
        drop: What to leave out.
        form: Name of the format, for messages.
        holds: Entries of `EXTRAS` that the format can hold.
    """
    found, _ = file_extras(adapter, adapter.config or {})
    for extra, key in found.items():
        if extra not in holds and extra not in drop:
            raise ValueError(f"{key}: the format {form} cannot hold it; pass drop=[{extra!r}] to leave it out.")
    kept = [name for name in adapter.modules if not drops(name, drop)]
    for name in kept:
        if adapter.modules[name].kind == "embedding":
            raise ValueError(f"{name}: the format {form} has no LoRA of embeddings; pass drop=[{name!r}].")
    if not kept:
        raise ValueError(f"drop={list(drop)!r} leaves no module; leave some out of it.")
    return kept


def write_tensors(path: Path, groups: Sequence[Callable[[], dict[str, Tensor]]], metadata: Mapping[str, str]) -> None:
    """Writes tensors group by group; each group is asked for twice, so that one is in memory."""
    infos: dict[str, TensorInfo] = {}
    for group in groups:
        for key, tensor in group().items():
            if key in infos:
                raise ValueError(f"{key}: two modules of the source have this name in the result; drop one.")
            infos[key] = TensorInfo.of(tensor)
    with TensorWriter(path, infos, metadata) as writer:
        for group in groups:
            for key, tensor in group().items():
                writer.write(key, tensor.contiguous())


def write_folder(folder: Path, loras: Loras) -> None:
    """Writes a folder of stock peft, with the whole names of the modules and their ranks and scales."""
    plans: dict[str, RankAndScale] = {}
    with_magnitude: set[str] = set()

    def group(name: str, make: Callable[[], Lora]) -> Callable[[], dict[str, Tensor]]:
        def tensors() -> dict[str, Tensor]:
            lora = make()
            plans[name] = RankAndScale(lora.rank, lora.scale)
            with_magnitude.update([name] if lora.magnitude is not None else [])
            return lora.tensors("peft", name, alpha=False)

        return tensors

    folder.mkdir(exist_ok=True)
    write_tensors(folder / WEIGHTS_NAME, [group(*item) for item in loras.items()], {"format": "pt"})
    if 0 < len(with_magnitude) < len(plans):
        plain = next(name for name in plans if name not in with_magnitude)
        raise NotImplementedError(f"{plain}: has no magnitudes and others have; peft has them for all or none.")
    write_config(folder, plain_fields(bool(with_magnitude)), plans, plans)


def plain_fields(use_dora: bool) -> dict[str, Any]:
    """Returns the fields of a LoRA's configuration that do not depend on its modules."""
    return {
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": use_dora,
    }
