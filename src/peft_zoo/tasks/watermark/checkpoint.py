"""Checkpoint of an interrupted training: one file, replaced atomically, that contains no secret of the key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_zoo.adapters.watermark_lora import WatermarkLoraConfig
from peft_zoo.common.atomic import replaced_file
from peft_zoo.tasks.watermark.controllers import Controller
from peft_zoo.tasks.watermark.key import WatermarkKey

NAME = "watermark_checkpoint.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")

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
        with safe_open(self.path, "pt") as file, torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(f"value.{name}"))
                moments = {moment: file.get_tensor(f"{moment}.{name}") for moment in MOMENTS}
                # AdamW keeps the step count on the CPU.
                state = {k: v if k == "step" else v.to(parameter.device) for k, v in moments.items()}
                optimizer.state[parameter] = state
        controller.load_state_dict(facts["controller"])
        return list(facts["trace"])

    def _facts(self) -> dict[str, Any]:
        """Returns the metadata of the file; empty if it is damaged."""
        try:
            with safe_open(self.path, "pt") as file:
                return json.loads((file.metadata() or {}).get("training", "{}"))
        except (SafetensorError, ValueError):
            return {}


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
