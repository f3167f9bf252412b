"""Checkpoint of an interrupted training: one file, replaced atomically, that contains no secret of the key."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_zoo.adapters.watermark_lora import WatermarkLoraConfig
from peft_zoo.common.atomic import replaced_file
from peft_zoo.common.checks import is_number
from peft_zoo.io import TensorFile, TensorInfo, parse_json
from peft_zoo.tasks.watermark.controllers import Controller
from peft_zoo.tasks.watermark.key import WatermarkKey

NAME = "watermark_checkpoint.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
TRACED = {"step", "psnr", "bit_accuracy", "lambda_i", "lambda_w", "seconds"}

# Module names are part of a fingerprint: a module that has moved keeps the name in saved checkpoints.
SAVED_MODULE_NAMES = {"peft_zoo.tasks.watermark.decoder": "peft_zoo.kernels.keyed_decoder"}


def fingerprint(
    config: WatermarkLoraConfig, key: WatermarkKey, images: Tensor, modules: Mapping[str, Any], adapter_name: str
) -> str:
    """Returns a hash of everything that a training depends on; of the key, only the commitment.

    `modules` are autoencoder, decoder and image loss by role; a module is hashed with all its tensors, a function by
    its name.
    """
    facts = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    digest = hashlib.sha256()
    digest.update(json.dumps([facts, key.commitment, adapter_name], sort_keys=True, default=str).encode())
    _add(digest, "images", images)
    for role, module in modules.items():
        kind = module if hasattr(module, "__qualname__") else type(module)
        module_name = SAVED_MODULE_NAMES.get(kind.__module__, kind.__module__)
        digest.update(f"{role} {module_name}.{kind.__qualname__}\n".encode())
        if isinstance(module, nn.Module):  # not the state dict, which omits non-persistent buffers
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                _add(digest, name, tensor)
    return digest.hexdigest()


class EmbedCheckpoint:
    """Checkpoint file, in a folder that need not exist, of the one training with the `fingerprint` `of`."""

    def __init__(self, folder: str | Path, of: str) -> None:
        self.path, self.of = Path(folder) / NAME, of
        if self.path.parent.exists() and not self.path.parent.is_dir():
            raise ValueError(f"checkpoint={str(folder)!r} is not a folder: give a new name, or the folder of a run.")
        if self.path.exists() and (found := self._facts().get("of")) != of:
            other = "is of a training with other settings, images, key, autoencoder or decoder"
            what = "is damaged" if found is None else other
            raise ValueError(f"checkpoint: {str(self.path)!r} {what}: give another folder, or delete it to start anew.")

    def save(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        controller: Controller,
        trace: list[dict[str, float]],
    ) -> None:
        """Replaces the file by the parameters, the state of AdamW and controller, and the trace of all steps."""
        tensors = {f"value.{name}": parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment].cpu().contiguous() for moment in MOMENTS}
        facts = {"of": self.of, "controller": controller.state_dict(), "trace": trace}
        with replaced_file(self.path) as work:
            save_file(tensors, work, metadata={"training": json.dumps(facts)})

    def load(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, controller: Controller
    ) -> list[dict[str, float]]:
        """Restores the arguments of `save` if there is a file; returns its trace, or an empty list."""
        if not self.path.exists():
            return []
        facts = self._facts()
        try:
            trace = _checked_trace(facts.get("trace"))
            with TensorFile(self.path) as file:
                tensors = _checked_tensors(file, parameters, len(trace))
            controller.load_state_dict(facts.get("controller"))
        except ValueError as error:
            raise ValueError(
                f"checkpoint: {str(self.path)!r} is damaged ({error}): give another folder, or delete it to start anew."
            ) from error
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"value.{name}"])
                moments = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS}
                # AdamW keeps the step count on the CPU.
                state = {k: v if k == "step" else v.to(parameter.device) for k, v in moments.items()}
                optimizer.state[parameter] = state
        return trace

    def _facts(self) -> dict[str, Any]:
        """Returns the metadata of the file; empty if it is damaged."""
        try:
            with TensorFile(self.path) as file:
                return parse_json(file.metadata.get("training", "{}").encode())
        except ValueError:
            return {}


def _checked_trace(trace: Any) -> list[dict[str, float]]:
    """Returns the trace in a checkpoint file; a ValueError unless it has the numbers of every step."""
    if not isinstance(trace, list) or not trace:
        raise ValueError("it has no trace")
    for place, entry in enumerate(trace, 1):
        is_entry = isinstance(entry, dict) and entry.keys() == TRACED and all(map(is_number, entry.values()))
        if not is_entry or entry["step"] != place:
            raise ValueError(f"trace: the entry of step {place} needs the numbers {', '.join(sorted(TRACED))}")
    return trace


def _checked_tensors(file: TensorFile, parameters: Mapping[str, nn.Parameter], steps: int) -> dict[str, Tensor]:
    """Reads the tensors of a checkpoint; a ValueError unless they are finite and those of `parameters`."""
    infos: dict[str, TensorInfo] = {}
    for name, parameter in parameters.items():
        infos |= {f"{part}.{name}": TensorInfo.of(parameter) for part in ("value", *MOMENTS)}
        infos[f"step.{name}"] = TensorInfo(torch.float32, ())
    if odd := sorted(infos.keys() ^ file.tensors.keys()):
        raise ValueError(f"the tensor {odd[0]!r} is missing or unknown")
    tensors = {}
    for name, info in infos.items():
        if file.tensors[name] != info:
            raise ValueError(f"{name} is {file.tensors[name]} instead of {info}")
        tensors[name] = tensor = file.read(name)
        least = -math.inf if name.startswith(("value.", "exp_avg.")) else 0.0
        if not tensor.isfinite().all() or (tensor < least).any() or (name.startswith("step.") and tensor != steps):
            raise ValueError(f"{name} has values that no training leaves")
    return tensors


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
