"""The configuration of a watermark, its target modules, and the plain LoRA files."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import peft_zoo
from peft_zoo import WatermarkLoraConfig
from peft_zoo.adapters.watermark_lora import WatermarkLoraModel, last_up_block
from peft_zoo.tasks.watermark.vae import add_lora, decode
from tests.tasks.watermark.samples import KEY, kl_vae, tiny_vae, watermark


def stable_diffusion() -> Any:
    """Returns the autoencoder of Stable Diffusion on the meta device."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        return AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2)


def test_it_is_registered() -> None:
    method = peft_zoo.methods()["watermark_lora"]
    assert method.peft_type == "ZOO_WATERMARK_LORA" and WatermarkLoraConfig().peft_type == "ZOO_WATERMARK_LORA"
    assert method.tuner_cls is WatermarkLoraModel and issubclass(WatermarkLoraConfig, LoraConfig)


# --- target modules ---


def test_the_number_of_parameters_is_that_of_the_paper() -> None:
    vae = stable_diffusion()
    parameters = add_lora(vae, WatermarkLoraConfig(), "watermark")
    assert sum(parameter.numel() for parameter in parameters.values()) == 35_328
    expected = {f"decoder.up_blocks.3.resnets.{i}.conv{j}" for i in range(3) for j in (1, 2)}
    assert {name.split(".lora_")[0] for name in parameters} == expected


def test_the_last_block_of_a_tiny_autoencoder() -> None:
    from diffusers import AutoencoderTiny

    with torch.device("meta"):
        vae = AutoencoderTiny()
    parameters = add_lora(vae, WatermarkLoraConfig(), "watermark")
    assert sum(parameter.numel() for parameter in parameters.values()) == 7_680
    assert {name.split(".lora_")[0] for name in parameters} == {f"decoder.layers.17.conv.{i}" for i in (0, 2, 4)}


@pytest.mark.parametrize("target", [None, "last_up_block"])
def test_get_peft_model_resolves_the_target_and_does_not_change_the_configuration(
    target: str | None, tmp_path: Path
) -> None:
    """One object on two models gives what two fresh objects give."""
    config = watermark(target_modules=target)
    before = copy.deepcopy(vars(config))
    for build, count in ((tiny_vae, 3), (kl_vae, 4)):
        vae = build()
        expected = last_up_block(vae)
        model = get_peft_model(vae, config)
        assert model.peft_config["default"].target_modules == expected
        assert sum(p.requires_grad for p in model.parameters()) == 2 * count
        model.save_pretrained(str(tmp_path / str(count)))
        assert vars(config) == before


def test_unknown_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target_modules=.*Linear"):
        last_up_block(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"target_modules=.*Sequential"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), watermark(target_modules="last_up_block"))  # type: ignore[arg-type]
    get_peft_model(nn.Sequential(nn.Linear(2, 2)), watermark(target_modules=["0"]))  # type: ignore[arg-type]


# --- fields ---


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("num_bits", 0),
        ("num_bits", 257),
        ("num_bits", 200),  # more than num_filters
        ("num_bits", "48"),
        ("num_filters", 1.5),
        ("decoder", "magic"),
        ("controller", "pid"),
        ("image_loss", "lpips"),
        ("augmentations", ["crop", "rotate"]),
        ("augmentations", "crop"),
        ("psnr_target", 0),
        ("psnr_target", math.nan),
        ("controller_rate", -1),
        ("controller_limit", math.inf),
        ("controller_gamma", "x"),
        ("learning_rate", 0.0),
        ("bit_target", 0.5),
        ("bit_target", 1.01),
        ("batch_size", 0),
        ("steps", 0),
        ("seed", -1),
        ("commitment", "abc"),
    ],
)
def test_invalid_fields_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"WatermarkLoraConfig: {field}="):
        WatermarkLoraConfig(**{field: value})


def test_no_field_is_secret() -> None:
    """Configurations are published: neither message, key, payload nor seed of the decoder may be a field."""
    own = {f.name for f in dataclasses.fields(WatermarkLoraConfig)} - {f.name for f in dataclasses.fields(LoraConfig)}
    assert not {name for name in own for word in ("message", "key", "secret", "payload") if word in name}
    text = json.dumps(WatermarkLoraConfig(commitment=KEY.commitment).to_dict(), default=str)
    assert KEY.secret.hex() not in text and str(KEY.seed("decoder")) not in text


# --- the plain LoRA files ---


def test_stock_peft_and_diffusers_load_what_is_saved(tmp_path: Path) -> None:
    vae, latents = kl_vae(), torch.randn(2, 4, 16, 16)
    clean = decode(vae, latents)
    model = get_peft_model(vae, watermark(init_lora_weights=False, lora_alpha=8))
    marked = decode(vae, latents)
    assert (marked - clean).abs().max() > 1e-3
    model.save_pretrained(str(tmp_path))
    plain = tmp_path / "plain_lora"
    assert json.loads((plain / "adapter_config.json").read_text())["peft_type"] == "LORA"
    for name in ("adapter_config.json", "pytorch_lora_weights.safetensors"):
        content = (plain / name).read_bytes()
        assert b"num_bits" not in content and b"ZOO" not in content

    for folder in (tmp_path, plain):
        with_peft = PeftModel.from_pretrained(kl_vae(), str(folder))
        assert torch.equal(decode(with_peft.base_model.model, latents), marked)
    stock = kl_vae()
    stock.load_lora_adapter(str(plain), prefix=None, use_safetensors=True, adapter_name="default")
    assert torch.equal(decode(stock, latents), marked)
    assert type(stock.peft_config["default"]) is LoraConfig


def test_saving_warns_that_an_adapter_is_no_protection(tmp_path: Path) -> None:
    """With a commitment, a warning. The card says it once in any case, and keeps the text of peft."""
    folder = tmp_path / "mine"
    model = get_peft_model(tiny_vae(), watermark(commitment=KEY.commitment), adapter_name="mine")
    for _ in range(2):
        with pytest.warns(UserWarning, match="as a LoRA") as caught:
            model.save_pretrained(str(tmp_path))
        assert len(caught) == 1 and caught[0].filename == __file__
        card = (folder / "README.md").read_text()
        assert card.count("protects nothing") == 1 and "(EW-LoRA, 8 bits)" in card and "- watermark" in card
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    empty = tmp_path / "empty"
    watermark(commitment=KEY.commitment).save_pretrained(str(empty))  # without weights
    assert [path.name for path in empty.iterdir()] == ["adapter_config.json"]
    get_peft_model(tiny_vae(), watermark()).save_pretrained(str(tmp_path / "blank"))
    assert "protects nothing" in (tmp_path / "blank" / "README.md").read_text()
