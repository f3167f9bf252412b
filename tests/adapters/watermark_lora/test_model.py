"""The configuration of a watermark, where its LoRA goes, its plain form, and the two controllers."""

from __future__ import annotations

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
from peft_zoo.tasks.watermark.vae import add_lora, decode
from peft_zoo.watermark import DlwsController, TwoSidedController, WatermarkLoraModel, last_up_block
from tests.tasks.watermark.samples import KEY, kl_vae, tiny_vae, watermark


def stable_diffusion() -> Any:
    """The autoencoder of Stable Diffusion, without memory."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        return AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2)


def test_it_is_registered() -> None:
    method = peft_zoo.methods()["watermark_lora"]
    assert method.peft_type == "ZOO_WATERMARK_LORA" and WatermarkLoraConfig().peft_type == "ZOO_WATERMARK_LORA"
    assert method.tuner_cls is WatermarkLoraModel and issubclass(WatermarkLoraConfig, LoraConfig)


# --- where it goes ---


def test_the_paper_s_number_of_parameters() -> None:
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
@pytest.mark.parametrize("build", [tiny_vae, kl_vae])
def test_peft_finds_it_too(build: Any, target: str | None) -> None:
    vae = build()
    expected = last_up_block(vae)
    model = get_peft_model(vae, watermark(target_modules=target))
    assert model.peft_config["default"].target_modules == expected
    assert sum(p.requires_grad for p in model.parameters()) == 2 * (3 if build is tiny_vae else 4)


def test_unknown_models_are_refused() -> None:
    with pytest.raises(ValueError, match="target_modules='last_up_block' is not known for Linear"):
        last_up_block(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="is not known for Sequential"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), watermark(target_modules="last_up_block"))  # type: ignore[arg-type]
    get_peft_model(nn.Sequential(nn.Linear(2, 2)), watermark(target_modules=["0"]))  # type: ignore[arg-type]


# --- fields ---


@pytest.mark.parametrize(
    ("field", "value", "fix"),
    [
        ("r", 0, "integer of at least 1"),
        ("num_bits", 0, "integer of at least 1"),
        ("num_bits", 257, "at most 256"),
        ("num_bits", 200, "use at most num_filters=160"),
        ("num_bits", "48", "integer"),
        ("num_filters", 1.5, "integer"),
        ("decoder", "magic", "use one of keyed, custom"),
        ("controller", "pid", "use one of two_sided, dlws"),
        ("image_loss", "lpips", "use one of mse, mse\\+l1"),
        ("augmentations", ["crop", "rotate"], "any of crop, resize, jpeg, noise"),
        ("augmentations", "crop", "use a list"),
        ("psnr_target", 0, "positive number"),
        ("psnr_target", math.nan, "positive number"),
        ("controller_rate", -1, "positive number"),
        ("controller_limit", math.inf, "positive number"),
        ("controller_gamma", "x", "positive number"),
        ("learning_rate", 0.0, "positive number"),
        ("bit_target", 0.5, "above 0.5"),
        ("bit_target", 1.01, "above 0.5"),
        ("batch_size", 0, "integer"),
        ("steps", 0, "integer"),
        ("seed", -1, "from 0 to 2\\^32"),
        ("commitment", "abc", "64 hexadecimal digits"),
    ],
)
def test_fields_that_cannot_be(field: str, value: Any, fix: str) -> None:
    with pytest.raises(ValueError, match=f"WatermarkLoraConfig: {field}=.* cannot be used; .*{fix}"):
        WatermarkLoraConfig(**{field: value})


def test_no_field_is_secret() -> None:
    """What is in a configuration gets published: neither message, key, payload nor seed of the decoder may be there."""
    own = {f.name for f in dataclasses.fields(WatermarkLoraConfig)} - {f.name for f in dataclasses.fields(LoraConfig)}
    assert not {name for name in own for word in ("message", "key", "secret", "payload") if word in name}
    text = json.dumps(WatermarkLoraConfig(commitment=KEY.commitment).to_dict(), default=str)
    assert KEY.secret.hex() not in text and str(KEY.seed("decoder")) not in text


# --- the plain form ---


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


@pytest.mark.parametrize("name", ["default", "mine"])
def test_saving_says_that_an_adapter_is_no_protection(tmp_path: Path, name: str) -> None:
    """With a commitment it is somebody's mark: a warning. The card says it once, and keeps what peft says."""
    folder = tmp_path if name == "default" else tmp_path / name
    model = get_peft_model(kl_vae(), watermark(commitment=KEY.commitment), adapter_name=name)
    for _ in range(2):
        with pytest.warns(UserWarning, match="has the watermark as a LoRA, which anybody leaves out") as caught:
            model.save_pretrained(str(tmp_path))
        assert len(caught) == 1 and caught[0].filename == __file__
        card = (folder / "README.md").read_text()
        assert card.count("protects nothing") == 1 and "(EW-LoRA, 8\nbits)" in card and "- watermark" in card
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    empty = tmp_path / "empty"
    watermark(commitment=KEY.commitment).save_pretrained(str(empty))  # a configuration alone is no adapter
    assert [path.name for path in empty.iterdir()] == ["adapter_config.json"]
    get_peft_model(kl_vae(), watermark()).save_pretrained(str(tmp_path / "blank"))
    assert "protects nothing" in (tmp_path / "blank" / "README.md").read_text()


# --- controllers ---


def test_the_two_sided_controller_by_hand() -> None:
    """Averages keep half of themselves; the picture goes first where both targets are missed."""
    controller = TwoSidedController(30, 0.9, rate=0.5, limit=1.2, decay=0.5)
    assert controller.weights() == (0.5, 0.5)
    steps = [
        # psnr, bits -> averages -> u
        ((40, 0.5), (40, 0.5), 0.5),  # only the bits miss
        ((30, 0.7), (35, 0.6), 1.0),
        ((35, 0.9), (35, 0.75), 1.2),  # the limit
        ((35, 1.05), (35, 0.9), 1.2),  # both hold
        ((23, 0.5), (29, 0.7), 0.7),  # both miss
        ((29, 1.1), (29, 0.9), 0.2),  # only the picture misses
        ((29, 0.9), (29, 0.9), -0.3),
        ((31, 0.9), (30, 0.9), -0.3),
    ]
    for (psnr, bits), averages, u in steps:
        controller.update(psnr, bits)
        assert (controller.psnr, controller.bit_accuracy) == pytest.approx(averages)
        assert controller.log_ratio == pytest.approx(u)
        lambda_i, lambda_w = controller.weights()
        assert lambda_i + lambda_w == pytest.approx(1) and math.log(lambda_w / lambda_i) == pytest.approx(u)


def test_algorithm_1_by_hand() -> None:
    controller = DlwsController(30, 0.9, gamma=0.3)
    assert controller.weights() == (1, 0)
    for _ in range(2):
        controller.update(25, 0.5)
    assert controller.weights() == pytest.approx((1, 1.2))  # bits first: the picture is not looked at
    for _ in range(4):
        controller.update(25, 0.95)
    assert controller.weights() == pytest.approx((2.2, 1.2)) and controller.bits_met == 4
    controller.update(31, 0.95)  # the fifth time that bits are right
    assert controller.bit_target == pytest.approx(0.98) and (controller.bits_met, controller.picture_met) == (0, 1)
    controller.update(31, 0.95)  # which is now too few
    assert controller.weights() == pytest.approx((2.2, 1.8)) and controller.picture_met == 1
    for _ in range(4):
        controller.update(31, 0.99)
    assert controller.psnr_target == 32.5 and controller.picture_met == 0
    controller.update(31, 0.99)
    assert controller.bit_target == 1.0  # and not 1.06
    assert controller.weights() == pytest.approx((2.5, 1.8))


@pytest.mark.parametrize("build", [lambda: TwoSidedController(30, 0.9), DlwsController])
def test_controllers_go_on_from_their_state(build: Any) -> None:
    facts = [(20 + 0.7 * step % 17, 0.6 + 0.05 * (step % 9)) for step in range(60)]
    whole, first, second = build(), build(), build()
    for fact in facts:
        whole.update(*fact)
    for fact in facts[:31]:
        first.update(*fact)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for fact in facts[31:]:
        second.update(*fact)
    assert second.state_dict() == whole.state_dict() and second.weights() == whole.weights()
    assert whole.state_dict() != build().state_dict()
    with pytest.raises(ValueError, match="has other fields: more"):
        second.load_state_dict({**whole.state_dict(), "more": 1})
