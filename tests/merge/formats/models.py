"""Released image and video models without memory, and small adapters for their modules."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def _diffusers(name: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**config)

    return make


def _clip(name: str, layers: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, name)(transformers.CLIPTextConfig(num_hidden_layers=layers))

    return make


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(num_layers=24, feed_forward_proj="gated-gelu"))


#: Makes the part of a family, in the sizes of a released model.
MODELS: dict[tuple[str, str], Callable[[], nn.Module]] = {
    ("sd", "unet"): _diffusers("UNet2DConditionModel", cross_attention_dim=768),
    ("sd", "text_encoder"): _clip("CLIPTextModel", 12),
    ("sdxl", "unet"): _diffusers("UNet2DConditionModel", **SDXL),
    ("sdxl", "text_encoder_2"): _clip("CLIPTextModelWithProjection", 32),
    ("sd3", "transformer"): _diffusers(
        "SD3Transformer2DModel", num_layers=24, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"
    ),
    ("flux", "transformer"): _diffusers("FluxTransformer2DModel", guidance_embeds=True),
    ("flux", "text_encoder_2"): _t5,
    ("wan", "transformer"): _diffusers("WanTransformer3DModel", image_dim=1280, added_kv_proj_dim=5120),
    ("hunyuan_video", "transformer"): _diffusers("HunyuanVideoTransformer3DModel"),
}
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
OTHERS = ("text_projection",)  # what no trainer of LoRAs adapts


def layers(family: str, part: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of all linear layers and convolutions of a model, by name."""
    with torch.device("meta"):
        model = MODELS[family, part]()
    found = model.named_modules()
    return {n: tuple(m.weight.shape) for n, m in found if isinstance(m, LAYERS) and n not in OTHERS}


def small(shapes: dict[str, tuple[int, ...]], divisor: int = 64) -> dict[str, tuple[int, ...]]:
    """The same layers with fewer rows and columns, in the same proportions where they are large."""
    return {n: tuple(s // divisor if s >= 256 else s for s in shape[:2]) + shape[2:] for n, shape in shapes.items()}


def save_lora(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    r: Callable[[str], int] = lambda name: 4,
    alpha: Callable[[str], float] = lambda name: 2.0,
    dtype: torch.dtype = torch.float16,
    fill: Callable[[str, dict[str, torch.Tensor]], None] | None = None,
) -> Path:
    """Writes a folder as peft does, with random factors; `fill` may change those of a module."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        own = {
            "A": torch.randn(r(name), *shape[1:], generator=generator).to(dtype),
            "B": torch.randn(shape[0], r(name), *[1] * (len(shape) - 2), generator=generator).to(dtype),
        }
        if fill is not None:
            fill(name, own)
        tensors |= {f"base_model.model.{name}.lora_{key}.weight": value for key, value in own.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    ranks, alphas = {n: r(n) for n in shapes}, {n: alpha(n) for n in shapes}
    first = next(iter(shapes))
    config = LoraConfig(
        r=ranks[first],
        lora_alpha=alphas[first],
        target_modules=sorted(shapes),
        rank_pattern={f"^{n}": v for n, v in ranks.items() if v != ranks[first]},
        alpha_pattern={f"^{n}": v for n, v in alphas.items() if v != alphas[first]},
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    return folder


def factors(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """B, A and scale of each module of an adapter."""
    from peft_zoo.io import open_adapter

    with open_adapter(path) as adapter:
        return {n: (adapter.read(m.key_B), adapter.read(m.key_A), m.scale) for n, m in adapter.modules.items()}


def assert_equal(one: Path, other: Path, but: Iterable[str] = ()) -> None:
    """Checks that two adapters have the same modules with the same bits and scales."""
    first, second = factors(one), factors(other)
    assert first.keys() - set(but) == second.keys()
    for name, (B, A, scale) in second.items():
        assert scale == first[name][2], name
        assert B.dtype == first[name][0].dtype and torch.equal(B, first[name][0]), name
        assert A.dtype == first[name][1].dtype and torch.equal(A, first[name][1]), name


def read_config(folder: Path) -> dict[str, Any]:
    """Content of `adapter_config.json`."""
    return json.loads((folder / "adapter_config.json").read_text())
