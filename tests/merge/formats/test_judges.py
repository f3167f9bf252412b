"""Converters and loaders of diffusers judge where updates go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_zoo.merge import convert
from tests.merge.formats.models import LAYERS, factors, save_lora

# One block of each kind, and two where the last one differs. Rows of Flux and HunyuanVideo are those of the released
# models, which the converters of diffusers have as constants.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], Callable[..., dict[str, Tensor]], bool]] = {
    "flux": (
        "FluxTransformer2DModel",
        {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
        single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
        True,
    ),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1},
        single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
        True,
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "caption_projection_dim": 16,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 12,
            "dual_attention_layers": (0,),
        },
        single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
        False,
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "ffn_dim": 20,
            "text_dim": 10,
            "image_dim": 8,
            "added_kv_proj_dim": 24,
        },
        single_file_utils.convert_wan_transformer_to_diffusers,
        False,
    ),
}


class Checkpoint(dict[str, Tensor]):
    """A checkpoint that has zeros for the biases and norms that a converter asks for."""

    def pop(self, key: str, *default: Any) -> Tensor:
        if key in self:
            return super().pop(key)
        weight = self.rows.get(key.removesuffix(".bias"), 1)
        return torch.zeros(weight)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rows = {key.removesuffix(".weight"): len(value) for key, value in self.items()}


def update(B: Tensor, A: Tensor, scale: float) -> Tensor:
    """Update of a weight, in its shape."""
    return scale * (B.flatten(1).double() @ A.flatten(1).double()).reshape(len(B), *A.shape[1:])


@pytest.mark.parametrize("family", list(TRANSFORMERS))
@pytest.mark.parametrize("shared", [True, False])
def test_converters_of_checkpoints_put_updates_where_ours_do(family: str, shared: bool, tmp_path: Path) -> None:
    name, config, converter, narrow = TRANSFORMERS[family]
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, name)(**config)
    shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, LAYERS)}
    if narrow:
        shapes = {n: (shape[0], 3, *shape[2:]) for n, shape in shapes.items()}
    common = {width: torch.randn(2, width) for width in {shape[1] for shape in shapes.values()}}

    def fill(module: str, own: dict[str, Tensor]) -> None:
        if shared and len(own["A"].shape) == 2:
            own["A"] = common[own["A"].shape[1]].clone()

    adapter = save_lora(tmp_path / "peft", shapes, lambda n: 2, lambda n: 3.0, torch.float32, fill)
    ours = {n: update(*own) for n, own in factors(adapter).items()}
    convert(adapter, tmp_path / "c.safetensors", to="comfy", family=family)
    in_file = factors(tmp_path / "c.safetensors")
    ranks = {len(A) for _, A, _ in in_file.values()}
    assert ranks == {2} if shared or family == "wan" else max(ranks) > 2
    weights = {f"{n.removeprefix('diffusion_model.')}.weight": update(*own) for n, own in in_file.items()}
    checkpoint = Checkpoint(weights)
    if family == "sd3":
        checkpoint["pos_embed"] = torch.zeros(1)
    theirs = converter(checkpoint)
    for module, change in ours.items():
        torch.testing.assert_close(theirs[f"{module}.weight"].reshape(change.shape), change, rtol=0, atol=0, msg=module)


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_pipelines_of_diffusers_load_what_we_write(to: str, tmp_path: Path) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=2, cross_attention_dim=8, attention_head_dim=2, sample_size=8
    )
    before = {n: p.clone() for n, p in unet.state_dict().items()}
    attentions = (".to_q", ".to_k", ".to_v", ".to_out.0")
    modules = unet.named_modules()
    shapes = {n: tuple(m.weight.shape) for n, m in modules if isinstance(m, LAYERS) and n.endswith(attentions)}
    # Of the alphas of attention in files of sd-scripts, this loader takes one for all.
    more = 0 if to == "kohya" else 3
    adapter = save_lora(tmp_path / "peft", shapes, alpha=lambda n: 2.0 + min(more, len(n) % 3), dtype=torch.float32)
    convert(adapter, tmp_path / "file.safetensors", to=to, family="sd", part="unet")
    state, alphas, metadata = Loader.lora_state_dict(
        str(tmp_path / "file.safetensors"), unet_config=unet.config, return_lora_metadata=True
    )
    Loader.load_lora_into_unet(state, network_alphas=alphas, unet=unet, adapter_name="a", metadata=metadata)
    unet.fuse_lora()
    unet.unload_lora()
    for name, own in factors(adapter).items():
        change = unet.state_dict()[f"{name}.weight"] - before[f"{name}.weight"]
        torch.testing.assert_close(change.double(), update(*own), rtol=1e-4, atol=1e-6, msg=name)


def _flux(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    return _convert_kohya_flux_lora_to_diffusers(state)


def _wan(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders.lora_conversion_utils import _convert_musubi_wan_lora_to_diffusers

    return _convert_musubi_wan_lora_to_diffusers(state)


@pytest.mark.parametrize(("family", "convert_file"), [("flux", _flux), ("wan", _wan)])
def test_converters_of_loras_give_blocks_the_updates_of_ours(
    family: str, convert_file: Callable[[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path
) -> None:
    name, config, _, narrow = TRANSFORMERS[family]
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, name)(**config)
    found = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, LAYERS) and "blocks." in n}
    shapes = {n: (shape[0], 3 if narrow else shape[1]) for n, shape in found.items()}
    common = torch.randn(2, 3)

    def fill(module: str, own: dict[str, Tensor]) -> None:
        own["A"] = common.clone() if narrow else own["A"]

    adapter = save_lora(tmp_path / "peft", shapes, lambda n: 2, lambda n: 1.0, torch.float32, fill)
    convert(adapter, tmp_path / "k.safetensors", to="kohya", family=family)
    theirs = convert_file(load_file(tmp_path / "k.safetensors"))
    for module, own in factors(adapter).items():
        B, A = (theirs[f"transformer.{module}.lora_{side}.weight"] for side in "BA")
        torch.testing.assert_close(update(B, A, 1.0), update(*own), rtol=1e-6, atol=1e-6, msg=module)
