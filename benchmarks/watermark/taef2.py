"""TAEF2, a small pretrained autoencoder of FLUX.2's latents, built from diffusers' `AutoencoderTiny`.

Three middle blocks of encoder and decoder have a branch with GroupNorm that diffusers 0.42 lacks; everything else,
including the names of tensors, is as in diffusers.

Source: github.com/madebyollin/taesd (MIT). The weights are read from `shared/data/models/taef2` next to the checkout,
or from the folder in `PEFT_ZOO_TAEF2`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from torch import Tensor, nn

FILE = "taef2_diffusers_keys.safetensors"
SAVED_FILE = "diffusion_pytorch_model.safetensors"
MIDDLE = {"encoder": (11, 12, 13), "decoder": (2, 3, 4)}
WIDTH, GROUPS = 64, 4


class MiddleBlock(nn.Module):
    """Block of `AutoencoderTiny` behind a residual branch with GroupNorm."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.conv, self.skip, self.fuse = block.conv, block.skip, block.fuse
        self.pool = nn.Sequential(
            nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False),
            nn.GroupNorm(GROUPS, 4 * WIDTH),
            nn.ReLU(),
            nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pool(x)
        return self.fuse(self.conv(x) + self.skip(x))


def taef2(folder: str | Path | None = None) -> Any:
    """Returns the pretrained model in evaluation mode; images in [-1, 1], latents of 1/8 of their sides.

    Args:
        folder: Folder with the weights, or one that `save_pretrained` or `merge_and_export` has written; None (default)
            for that of `available`.

    Raises:
        ValueError: If the folder has no weights.
    """
    folder = folder or available()
    names = [] if folder is None else [name for name in (FILE, SAVED_FILE) if Path(folder, name).is_file()]
    if folder is None or not names:
        raise ValueError(f"folder={str(folder)!r} has no {FILE}: set PEFT_ZOO_TAEF2 to the folder that has it.")
    model = untrained()
    model.load_state_dict(load_file(Path(folder, names[0])))
    return model.eval()


def untrained() -> Any:
    """Returns a model of the same architecture with random weights."""
    model = AutoencoderTiny(latent_channels=32)
    for side, indices in MIDDLE.items():
        layers = model.get_submodule(side).layers
        for index in indices:
            layers[index] = MiddleBlock(layers[index])
    return model


def available() -> Path | None:
    """Returns the folder of the weights, or None if they are not on this machine."""
    beside = Path(__file__).parents[3] / "shared" / "data" / "models" / "taef2"
    folder = Path(os.environ.get("PEFT_ZOO_TAEF2", beside))
    return folder if (folder / FILE).is_file() else None
