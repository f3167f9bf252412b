"""A small world for the diffusion task: drawings in nine classes, and a denoiser with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from peft import LoraConfig, get_peft_model

from peft_zoo.tasks.diffusion import ADAPTED_LAYERS
from peft_zoo.tasks.diffusion.pipeline import ClassConditionalPipeline, load_pipeline

SHAPE = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "num_class_embeds": 10,
}


def drawings(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey rectangles `(count, 28, 28)` whose height and width tell the class, with some noise on them."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.uint8) % 9
    images = np.zeros((count, 28, 28), np.uint8)
    for image, label in zip(images, labels, strict=True):
        height, width = 12 + 7 * (label // 3), 12 + 7 * (label % 3)
        top, left = (28 - height) // 2, (28 - width) // 2
        image[top : top + height, left : left + width] = random.integers(100, 200, (height, width))
    return images, labels


@pytest.fixture(scope="session")
def garment_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .npz file of 180 training and 45 test drawings."""
    path = tmp_path_factory.mktemp("garments") / "drawings.npz"
    (x_train, y_train), (x_test, y_test) = drawings(180, 0), drawings(45, 1)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline with random weights, for images of 16 pixels."""
    folder = tmp_path_factory.mktemp("tiny-base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ClassConditionalPipeline(UNet2DModel(**SHAPE), DDIMScheduler(1000)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lora_folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of two saved LoRAs with random weights, by name."""
    folders = {name: tmp_path_factory.mktemp("loras") / name for name in ("one", "two")}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for folder in folders.values():
            config = LoraConfig(r=2, target_modules=ADAPTED_LAYERS, init_lora_weights=False)
            get_peft_model(load_pipeline(tiny_base).unet, config).save_pretrained(str(folder))
    return folders
