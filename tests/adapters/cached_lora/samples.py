"""Small denoisers of every kind with LoRAs, and the sampling loop of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    Lumina2Transformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

NAMES = ("one", "two", "three")
SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(clip_sample=False, steps_offset=1),
    "dpm++": lambda: DPMSolverMultistepScheduler(steps_offset=1),
    "heun": lambda: HeunDiscreteScheduler(steps_offset=1),
}


def tiny(channels: int) -> dict[str, Any]:
    """Arguments that all tiny UNets share."""
    return {
        "sample_size": 8,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
    }


def sd_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **tiny(4),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    )


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **tiny(4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=32,
        cross_attention_dim=8,
    )


def class_unet() -> UNet2DModel:
    return UNet2DModel(
        **tiny(1),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        num_class_embeds=5,
    )


def flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )


def sd3() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
    )


def lumina() -> Lumina2Transformer2DModel:
    """A transformer whose blocks diffusers' registry lacks, so that nothing is cached."""
    return Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cap_feat_dim=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(16, 16, 16),
    )


def dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        num_embeds_ada_norm=5,
    )


def text(rows: int) -> dict[str, Any]:
    return {"encoder_hidden_states": torch.randn(rows, 3, 8)}


def sdxl_condition(rows: int) -> dict[str, Any]:
    added = {"text_embeds": torch.randn(rows, 8), "time_ids": torch.randn(rows, 6)}
    return {**text(rows), "added_cond_kwargs": added}


def classes(rows: int) -> dict[str, Any]:
    return {"class_labels": torch.arange(rows) % 5}


def flux_condition(rows: int) -> dict[str, Any]:
    place = torch.arange(16)
    return {
        **text(rows),
        "pooled_projections": torch.randn(rows, 8),
        "img_ids": torch.stack([place * 0, place // 4, place % 4], 1).float(),
        "txt_ids": torch.zeros(3, 3),
        "guidance": torch.full((rows,), 3.5),
    }


def sd3_condition(rows: int) -> dict[str, Any]:
    return {**text(rows), "pooled_projections": torch.randn(rows, 8)}


def rising(t: Any) -> float:
    """Timestep of a model for which 0 is noise and 1 the image, as for Lumina."""
    return 1 - float(t) / 1000


@dataclass(frozen=True)
class Kind:
    """A kind of denoiser.

    Attributes:
        make: Builds the model.
        condition: Returns the arguments beside sample and timestep for a number of rows.
        shape: Shape of one sample.
        targets: Target modules of the LoRAs.
        time: Converts a scheduler's timestep to that of the denoiser, as its pipeline does.
    """

    make: Callable[[], Any]
    condition: Callable[[int], dict[str, Any]]
    shape: tuple[int, ...]
    targets: tuple[str, ...] = ("to_q", "to_v", "to_out.0")
    time: Callable[[Any], Any] = float


KINDS = {
    "sd": Kind(sd_unet, text, (4, 8, 8), ("to_v", "conv1", "time_emb_proj")),
    "sdxl": Kind(sdxl_unet, sdxl_condition, (4, 8, 8), ("to_v", "conv2")),
    "class": Kind(class_unet, classes, (1, 8, 8), ("to_q", "to_v", "conv1", "conv2")),
    "flux": Kind(flux, flux_condition, (16, 4)),
    "sd3": Kind(sd3, sd3_condition, (4, 8, 8)),
    "rising": Kind(sd3, sd3_condition, (4, 8, 8), time=rising),
    "dit": Kind(dit, classes, (4, 8, 8), ("to_q", "to_v", "ff.net.2")),
}


def denoiser(kind: str = "sd", adapters: Sequence[str] = NAMES) -> Any:
    """Returns a denoiser in evaluation mode with LoRAs that change its output."""
    torch.manual_seed(0)
    model = KINDS[kind].make().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    add_loras(model, adapters, KINDS[kind].targets)
    return model


def add_loras(model: nn.Module, adapters: Sequence[str], targets: Sequence[str]) -> None:
    """Adds LoRAs of different ranks in place, as `load_lora_adapter` does."""
    tuner: LoraModel | None = None
    for rank, name in enumerate(adapters, start=2):
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights=False)
        if tuner is None:
            tuner = LoraModel(model, {name: config}, name)
        else:
            tuner.peft_config[name] = config
            tuner.inject_adapter(model, name)
    model.eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module._active_adapter = list(adapters)[:1]


def inputs(kind: str = "sd", rows: int = 2, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
    """Returns a noisy sample and the other arguments of the denoiser, without the timestep."""
    torch.manual_seed(seed)
    return torch.randn(rows, *KINDS[kind].shape), KINDS[kind].condition(rows)


def only(model: nn.Module, names: Sequence[str]) -> None:
    """Activates exactly these adapters, without any of our code."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module._active_adapter = list(names)


@torch.no_grad()
def call(model: Any, sample: Tensor, timestep: float, condition: dict[str, Any]) -> Tensor:
    """Returns one noise prediction."""
    steps = torch.full((len(sample),), timestep)
    output: Tensor = model(sample, timestep=steps, **condition, return_dict=False)[0]
    return output


@torch.no_grad()
def generate(
    model: Any, kind: str, scheduler: Any, steps: int = 6, guidance: float = 0.0, seed: int = 0, rows: int = 2
) -> Tensor:
    """Runs a generation as a pipeline does, with unconditional and conditional halves in one batch under guidance."""
    sample, condition = inputs(kind, 2 * rows if guidance else rows, seed)
    sample = sample[:rows]
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        batch = scheduler.scale_model_input(torch.cat([sample, sample]) if guidance else sample, t)
        noise = call(model, batch, KINDS[kind].time(t), condition)
        if guidance:
            without, given = noise.chunk(2)
            noise = without + guidance * (given - without)
        sample = scheduler.step(noise, t, sample).prev_sample
    return sample


# One scheduler and one guidance for each kind, so that every scheduler and guidance meets several kinds.
CASES = {kind: (tuple(SCHEDULERS)[place % 3], (0.0, 3.0)[place % 2]) for place, kind in enumerate(KINDS)}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of denoiser."""
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str) -> Any:
    """A denoiser of that kind, with LoRAs."""
    return denoiser(kind)
