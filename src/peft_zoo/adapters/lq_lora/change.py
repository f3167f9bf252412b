r"""The trained change of a saved LQ-LoRA, as a LoRA for the base model before quantization.

Training started at `W ~ Q + B0 A0` and ended at `Q + s B A`. The trained change is the difference::

    s B A - B0 A0  =  [s B, -B0] [A; A0]          a LoRA of rank r + r0 for W

On the base model it gives W + s B A - B0 A0, where the adapter gave Q + s B A: they differ by the quantization error
`W - Q - B0 A0`.

Source: the same difference of factors is how PiSSA (arXiv 2404.02948), section 3, is shared as a LoRA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peft_zoo.adapters.lq_lora.nf_linear import NF8_CONFIG, Factors, NFLinear, nf8_rank, unpack_initial_factors
from peft_zoo.io import LoraAdapter, TensorFile, TensorInfo
from peft_zoo.kernels.normal_float.quantize import NFTensor, empty_nf


class TrainedChange(LoraAdapter):
    """Reads a saved LQ-LoRA as the LoRA of its trained change.

    Modules that were quantized have the rank r + r0 and the scale 1; the others keep their LoRA. The tensors of the
    quantized layers are none of `other_keys`.

    Args:
        file: The open weights file of an adapter that was saved with its initial factors.
        config: Content of `adapter_config.json`.

    Raises:
        ValueError: If the file does not match its configuration, or lacks the initial factors.
    """

    def __init__(self, file: TensorFile, config: Mapping[str, Any]) -> None:
        if config.get("save_base") == "none":
            raise ValueError(
                f"{file.path.parent}: save_base='none' leaves out the initial factors; load the adapter onto its base, "
                "set save_base='quantized' in its configuration, and save it again."
            )
        super().__init__(file, {**config, "peft_type": "LORA"}, NFLinear.ALL)
        self._saved = dict(self.modules)
        parts = {_key(name, part) for name in self.modules for part in NFLinear.ALL}
        self.other_keys = [key for key in self.other_keys if key not in parts]
        for name, module in self._saved.items():
            if self._is_quantized(name):
                rank = module.rank + self._first_rank(name)
                self.modules[name] = dataclasses.replace(module, rank=rank, scale=1.0)

    def factors(self, name: str) -> Factors:
        """Reads factors B and A of a module's trained change; in float32 if it is quantized."""
        B, A = super().factors(name)
        if not self._is_quantized(name):
            return B, A
        first_B, first_A = self._initial_factors(name)
        return torch.cat([self._saved[name].scale * B.float(), -first_B], 1), torch.cat([A.float(), first_A])

    def _initial_factors(self, name: str) -> Factors:
        """Initial factors B0 and A0 of a quantized module, in float32."""
        if _key(name, NFLinear.INITIAL[0]) in self.file.tensors:
            first_B, first_A = (self.read(_key(name, part)).float() for part in NFLinear.INITIAL)
            return first_B, first_A
        packed = NFTensor(*(self.read(_key(name, part)) for part in NFLinear.INITIAL_NF8))
        return unpack_initial_factors(packed, self._saved[name].sizes)

    def _is_quantized(self, name: str) -> bool:
        """Whether the base layer of a module is quantized."""
        return _key(name, "codes") in self.file.tensors

    def _first_rank(self, name: str) -> int:
        """Validates the initial factors of a module and returns their rank."""
        infos = {
            part: info
            for part in (*NFLinear.INITIAL, *NFLinear.INITIAL_NF8)
            if (info := self.file.tensors.get(_key(name, part))) is not None
        }
        wanted, rank = self._initial_shapes(name, infos)
        for part, shape in wanted.items():
            if infos[part].shape != shape:
                raise ValueError(
                    f"module {name}: {part} {infos[part].shape} does not fit its LoRA, {shape} does; get the file "
                    "again."
                )
        return rank

    def _initial_shapes(self, name: str, infos: Mapping[str, TensorInfo]) -> tuple[dict[str, tuple[int, ...]], int]:
        """Returns the shapes that the initial factors of a module must have, and their rank."""
        rows, columns = self._saved[name].sizes
        if infos.keys() == set(NFLinear.INITIAL):
            rank = infos["initial_A"].shape[0]
            return {"initial_B": (rows, rank), "initial_A": (rank, columns)}, rank
        if infos.keys() == set(NFLinear.INITIAL_NF8):
            rank = nf8_rank(infos["initial_codes"].numel, (rows, columns))
            empty: tuple[Tensor, ...] = empty_nf(NF8_CONFIG, rank * (rows + columns), "meta")
            return {part: tuple(t.shape) for part, t in zip(NFLinear.INITIAL_NF8, empty, strict=True)}, rank
        raise ValueError(
            f"{self.file.path}: has no initial factors of {name}; quantize with keep_init='nf8' to export a LoRA for "
            "the base model, or pass base=."
        )


def _key(name: str, part: str) -> str:
    """Returns the key in the file of a tensor of a quantized layer."""
    return f"base_model.model.{name}.base_layer.{part}"
