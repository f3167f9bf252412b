"""Builders of adapter files, good and bad."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

PREFIX = "base_model.model."


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header (JSON, or bytes as they are) that claims to be of any length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """Header entry of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def peft_folder(folder: Path, tensors: Mapping[str, Tensor], /, **config: Any) -> Path:
    """A folder as peft saves it; the keys without their prefix, rank and alpha 2 unless said otherwise."""
    folder.mkdir(exist_ok=True)
    save_file({PREFIX + key: value for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def pair(name: str = "q", rank: int = 2, out: int = 3, into: int = 5, **changes: Tensor) -> dict[str, Tensor]:
    """The two factors of a linear layer, some tensors replaced or added by the end of their keys."""
    tensors = {"lora_A.weight": torch.randn(rank, into), "lora_B.weight": torch.randn(out, rank)}
    return {f"{name}.{key}": value for key, value in {**tensors, **changes}.items()}


class Zoo(nn.Module):
    """One layer of each kind that peft's LoRA adapts; never run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 6, (3, 2))
        self.point = nn.Conv2d(4, 6, 1)
        self.conv3 = nn.Conv3d(2, 6, (1, 2, 3))
        self.words = nn.Embedding(9, 5)


ZOO = ["linear", "conv1", "conv2", "point", "conv3", "words"]
