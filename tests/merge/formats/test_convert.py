"""Round trips between formats: the bits of factors and the scales come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_zoo.merge import convert
from tests.merge.formats.models import MODELS, assert_equal, factors, layers, read_config, save_lora, small

FORMATS = ("kohya", "comfy", "diffusers")


def rank(name: str) -> int:
    """A rank that depends on the block, so that modules that one matrix holds may differ."""
    return 2 + len(name) % 3


@pytest.mark.parametrize(("family", "part"), list(MODELS))
def test_peft_to_any_format_and_back_keeps_every_bit(family: str, part: str, tmp_path: Path) -> None:
    shapes = small(layers(family, part))
    adapter = save_lora(tmp_path / "peft", shapes, rank, lambda name: 0.5 * rank(name), torch.bfloat16)
    for to in FORMATS:
        file = tmp_path / f"{to}.safetensors"
        report = convert(adapter, file, to=to, family=family, part=part)
        assert report.source == "peft" and report.modules == {"": len(shapes)}
        convert(file, tmp_path / f"{to}-back", family=family)
        assert_equal(adapter, tmp_path / f"{to}-back")
        again = tmp_path / f"{to}-again.safetensors"
        convert(tmp_path / f"{to}-back", again, to=to, family=family, part=part)
        assert again.read_bytes() == file.read_bytes()


def test_formats_convert_to_each_other(tmp_path: Path) -> None:
    adapter = save_lora(tmp_path / "peft", small(layers("sd", "unet")))
    source = adapter
    for to in ("kohya", "comfy", "diffusers", "kohya", "peft"):
        target = tmp_path / (f"{to}-{source.stem}.safetensors" if to != "peft" else "back")
        convert(source, target, to=to, family="sd", part="unet" if source == adapter else None)
        source = target
    assert_equal(adapter, source)


def test_parts_of_a_pipeline_are_folders(tmp_path: Path) -> None:
    for part in ("unet", "text_encoder_2"):
        save_lora(tmp_path / "peft" / part, small(layers("sdxl", part)), alpha=lambda name: 3.0)
    report = convert(tmp_path / "peft", tmp_path / "k.safetensors", to="kohya")
    assert report.modules == {"unet": 794, "text_encoder_2": 192}
    keys = load_file(tmp_path / "k.safetensors").keys()
    assert "lora_te2_text_model_encoder_layers_31_mlp_fc2.alpha" in keys
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_up.weight" in keys
    convert(tmp_path / "k.safetensors", tmp_path / "back")
    for part in ("unet", "text_encoder_2"):
        assert_equal(tmp_path / "peft" / part, tmp_path / "back" / part)


def test_flat_names_of_diffusers_are_read_for_sdxl(tmp_path: Path) -> None:
    name = "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k"
    flat = f"lora_unet_{name.replace('.', '_')}"
    tensors = {f"{flat}.lora_down.weight": torch.randn(2, 6), f"{flat}.lora_up.weight": torch.randn(4, 2)}
    save_file(tensors, tmp_path / "k.safetensors")
    convert(tmp_path / "k.safetensors", tmp_path / "peft")
    assert factors(tmp_path / "peft")[name][2] == 1  # without an alpha it is the rank
    config = read_config(tmp_path / "peft")
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 2, [name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alpha", [1.0, 0.1, 100.3])
def test_alphas_are_kept(dtype: torch.dtype, alpha: float, tmp_path: Path) -> None:
    stored = torch.tensor(alpha, dtype=dtype)
    tensors = {"lora_unet_conv_in.lora_down.weight": torch.randn(7, 4, 3, 3).to(dtype)}
    tensors |= {"lora_unet_conv_in.lora_up.weight": torch.randn(8, 7, 1, 1).to(dtype)}
    save_file({**tensors, "lora_unet_conv_in.alpha": stored}, tmp_path / "k.safetensors", {"format": "pt"})
    convert(tmp_path / "k.safetensors", tmp_path / "peft", family="sd")
    assert factors(tmp_path / "peft")["conv_in"][2] == stored.double().item() / 7
    convert(tmp_path / "peft", tmp_path / "again.safetensors", to="kohya", family="sd", part="unet")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "k.safetensors").read_bytes()


def test_metadata_tells_pipelines_of_diffusers_ranks_and_alphas(tmp_path: Path) -> None:
    shapes = {"conv_in": (8, 4, 3, 3), "time_embedding.linear_1": (8, 6)}
    save_lora(tmp_path / "peft", shapes, r=lambda n: len(n) % 5 + 1, alpha=lambda n: 3.0)
    convert(tmp_path / "peft", tmp_path / "d.safetensors", to="diffusers", part="unet")
    from peft_zoo.io import open_adapter

    with open_adapter(tmp_path / "d.safetensors") as adapter, safe_open(tmp_path / "d.safetensors", "pt") as file:
        assert adapter.format == "diffusers_peft" and "lora_adapter_metadata" in file.metadata()
        assert {n: m.scale for n, m in adapter.modules.items()} == {
            "unet.conv_in": 3 / 3,
            "unet.time_embedding.linear_1": 3 / 4,
        }


def test_the_base_says_the_family_and_the_numbers_of_blocks(tmp_path: Path) -> None:
    names = [f"transformer_blocks.{i}.attn.add_q_proj" for i in range(3)]  # of Flux, SD3 and HunyuanVideo
    adapter = save_lora(tmp_path / "peft", dict.fromkeys(names, (8, 8)))
    config = {"_class_name": "FluxTransformer2DModel", "num_layers": 3, "num_single_layers": 1}
    (tmp_path / "base" / "transformer").mkdir(parents=True)
    (tmp_path / "base" / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="family=None"):
        convert(adapter, tmp_path / "k.safetensors", to="kohya")
    convert(adapter, tmp_path / "k.safetensors", to="kohya", base=tmp_path / "base")
    assert "lora_unet_double_blocks_2_txt_attn_qkv.alpha" in load_file(tmp_path / "k.safetensors")
    with pytest.raises(ValueError, match=r"transformer_blocks\.2"):
        convert(adapter, tmp_path / "l.safetensors", to="kohya", config={**config, "num_layers": 2})
    for field, value in (("_class_name", "Other"), ("num_layers", "3"), ("num_single_layers", 10**9)):
        with pytest.raises(ValueError, match=field):
            convert(adapter, tmp_path / "l.safetensors", to="kohya", config={**config, field: value})
    unet = {"_class_name": "UNet2DConditionModel", "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    for field, value in (
        ("layers_per_block", 10**6),
        ("up_block_types", ["Other"]),
        ("transformer_layers_per_block", []),
    ):
        with pytest.raises(ValueError, match=field):
            convert(adapter, tmp_path / "l.safetensors", to="kohya", config={**unet, field: value})


def test_refusals_name_the_field_and_write_nothing(tmp_path: Path) -> None:
    adapter = save_lora(tmp_path / "peft", {"conv_in": (8, 4, 3, 3)})
    out = tmp_path / "out" / "k.safetensors"
    with pytest.raises(ValueError, match="to="):
        convert(adapter, out, to="pickle")
    with pytest.raises(ValueError, match="dst="):
        convert(adapter, tmp_path / "k.bin", to="kohya", family="sd")
    with pytest.raises(ValueError, match="part="):
        convert(adapter, out, to="kohya", part="vae")
    with pytest.raises(ValueError, match="already"):
        convert(adapter, tmp_path / "x", to="peft")
    with pytest.raises(ValueError, match="does not exist"):
        convert(tmp_path / "nothing", out, to="kohya")
    with pytest.raises(ValueError, match="leaves no module"):
        convert(adapter, out, to="kohya", family="sd", part="unet", drop=["conv_in"])
    assert not out.parent.exists()
