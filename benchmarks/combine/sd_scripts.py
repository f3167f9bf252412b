"""Runs the merging function of a checkout of sd-scripts, without the libraries that its training needs."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FILE = "sd_scripts.safetensors"
SCRIPT = Path("networks", "svd_merge_lora.py")


def write_file(folder: Path, B: Tensor, A: Tensor, alpha: float) -> None:
    """Writes factors under the names of sd-scripts beside an adapter."""
    tensors = {"lora_down.weight": A, "lora_up.weight": B, "alpha": torch.tensor(alpha)}
    save_file({f"lora_unet_0.{part}": tensor.contiguous() for part, tensor in tensors.items()}, folder / FILE)


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Puts stand-ins for what the script imports and its merging function does not need, but for metadata."""
    found: dict[str, Any] = {name: types.ModuleType(name) for name in ("library", "lora")}
    for name in ("sai_model_spec", "train_util", "model_util", "utils"):
        module: Any = types.ModuleType(f"library.{name}")
        found[f"library.{name}"] = module
        setattr(found["library"], name, module)
    found["library.utils"].setup_logging = lambda: None
    train_util = found["library.train_util"]
    train_util.load_metadata_from_safetensors = lambda path: {}
    train_util.build_minimum_network_metadata = lambda *args: {}
    train_util.SS_METADATA_KEY_V2 = train_util.SS_METADATA_KEY_BASE_MODEL_VERSION = ""
    before = {name: sys.modules.get(name) for name in found}
    sys.modules.update(found)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old


def load_script(checkout: Path) -> Any:
    """Imports the script of a checkout."""
    spec = importlib.util.spec_from_file_location("sd_scripts_merge", checkout / SCRIPT)
    if spec is None or spec.loader is None or not (checkout / SCRIPT).is_file():
        raise ValueError(f"--sd-scripts {checkout}: has no {SCRIPT}; give a checkout of sd-scripts.")
    script = importlib.util.module_from_spec(spec)
    with _stand_ins():
        spec.loader.exec_module(script)
    return script


def merge(script: Any, folders: Sequence[Path], weights: Sequence[float], rank: int) -> tuple[Tensor, Tensor]:
    """Merges the files of `write_file`; the time includes reading. Its alpha is the rank."""
    logging.getLogger("sd_scripts_merge").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        paths = [str(folder / FILE) for folder in folders]
        tensors = script.merge_lora_models(paths, list(weights), [], rank, rank, None, torch.float32)[0]
    return tensors["lora_unet_0.lora_up.weight"], tensors["lora_unet_0.lora_down.weight"]
