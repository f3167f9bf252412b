"""What an interrupted training goes on from: one file, replaced as a whole, that holds nothing of the key."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_zoo.adapters.watermark_lora import WatermarkLoraConfig
from peft_zoo.tasks.watermark.controllers import DlwsController, TwoSidedController
from peft_zoo.tasks.watermark.key import WatermarkKey

__all__: list[str] = []

NAME = "watermark_checkpoint.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")

# Names of modules are part of a fingerprint; a module that has moved keeps the name that saved checkpoints have.
SAVED_MODULE_NAMES = {
    "peft_zoo.tasks.watermark.decoder": "peft_zoo.kernels.keyed_decoder",
    "peft_zoo.tasks.watermark.losses": "peft_zoo.adapters.watermark_lora_losses",
}


def fingerprint(
    config: WatermarkLoraConfig, key: WatermarkKey, images: Tensor, modules: Mapping[str, Any], adapter_name: str
) -> str:
    """A hash of what a training depends on; of the key it knows the commitment.

    Args:
        config: What is trained.
        key: Whose message.
        images: On what.
        modules: Autoencoder, decoder and image loss, by what they are there for: of a module all its tensors count, of
            a function its name.
        adapter_name: Of the LoRA.
    """
    facts = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    digest = hashlib.sha256()
    digest.update(json.dumps([facts, key.commitment, adapter_name], sort_keys=True, default=str).encode())
    _add(digest, "images", images)
    for role, module in modules.items():
        kind = module if hasattr(module, "__qualname__") else type(module)
        module_name = SAVED_MODULE_NAMES.get(kind.__module__, kind.__module__)
        digest.update(f"{role} {module_name}.{kind.__qualname__}\n".encode())
        if isinstance(module, nn.Module):  # not its state dict, which leaves buffers out that are not persistent
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                _add(digest, name, tensor)
    return digest.hexdigest()


class EmbedCheckpoint:
    """The file of one training.

    Raises:
        ValueError: If the folder has the checkpoint of another training.
    """

    def __init__(self, folder: str | Path, of: str) -> None:
        self.path, self.of = Path(folder) / NAME, of
        if self.path.parent.exists() and not self.path.parent.is_dir():
            raise ValueError(f"checkpoint={str(folder)!r} is no folder: give a new name, or the folder of a run.")
        if self.path.exists() and (found := self._facts().get("of")) != of:
            what = (
                "is damaged"
                if found is None
                else "is of a training with other settings, images, key, autoencoder or decoder"
            )
            raise ValueError(f"{str(self.path)!r} {what}: give another folder, or delete it to start anew.")

    def save(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        controller: TwoSidedController | DlwsController,
        trace: list[dict[str, float]],
    ) -> None:
        """Replace the file by one of now."""
        tensors = {f"value.{name}": parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment].cpu().contiguous() for moment in MOMENTS}
        facts = {"of": self.of, "controller": controller.state_dict(), "trace": trace}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        work = self.path.with_name(f".unfinished-{NAME}")
        save_file(tensors, work, metadata={"training": json.dumps(facts)})
        with work.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(work, self.path)

    def load(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        controller: TwoSidedController | DlwsController,
    ) -> list[dict[str, float]]:
        """Fill in what was saved, if anything was.

        Returns:
            The trace so far.
        """
        if not self.path.exists():
            return []
        facts = self._facts()
        with safe_open(self.path, "pt") as file, torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(f"value.{name}"))
                moments = {moment: file.get_tensor(f"{moment}.{name}") for moment in MOMENTS}
                # As AdamW keeps them: the count of steps stays on the CPU.
                state = {k: v if k == "step" else v.to(parameter.device) for k, v in moments.items()}
                optimizer.state[parameter] = state
        controller.load_state_dict(facts["controller"])
        return list(facts["trace"])

    def _facts(self) -> dict[str, Any]:
        try:
            with safe_open(self.path, "pt") as file:
                return json.loads((file.metadata() or {}).get("training", "{}"))
        except (SafetensorError, ValueError):
            return {}


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
