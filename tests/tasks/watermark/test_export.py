"""Exported autoencoders: the weights have the mark, the files lack the key, and the model does not change."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, DiffusionPipeline
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_zoo.tasks.watermark.export import merge_and_export, merged
from peft_zoo.tasks.watermark.vae import decode, encode
from peft_zoo.watermark import WatermarkKey, embed_watermark, read_bits, save_decoder, verify_watermark
from tests.tasks.watermark.conftest import Embedded
from tests.tasks.watermark.samples import KEY, Plain, kl_vae, pictures, tiny_vae, watermark

CONFIG = watermark(steps=1, commitment=KEY.commitment)


@pytest.fixture(scope="module")
def kl_marked() -> Any:
    """A marked `AutoencoderKL`; tests must not change it."""
    vae = kl_vae()
    embed_watermark(vae, pictures(32), CONFIG, KEY, eval_images=pictures(2))
    return vae


def outputs(vae: Any) -> Tensor:
    with torch.no_grad():
        return decode(vae, encode(vae, pictures(9, seed=4)))


def test_an_exported_autoencoder_carries_the_mark_without_peft(embedded: Embedded, tmp_path: Path) -> None:
    vae, report = embedded.vae, embedded.report
    before = outputs(vae)
    rates = {"fpr": 0.01, "measured": 0.009}
    folder = merge_and_export(vae, tmp_path / "out", embedded.config, KEY, calibration=rates)
    assert torch.equal(outputs(vae), before) and any(isinstance(m, BaseTunerLayer) for m in vae.modules())
    loaded = AutoencoderTiny.from_pretrained(folder)
    assert not any(isinstance(module, BaseTunerLayer) for module in loaded.modules())
    assert loaded.state_dict().keys() == tiny_vae().state_dict().keys()
    torch.testing.assert_close(outputs(loaded), before, rtol=0, atol=1e-5)  # rounding of one sum
    assert verify_watermark(outputs(loaded), KEY, decoder=report.decoder, fpr=0.01).decision
    record = json.loads((folder / "watermark.json").read_text())
    assert record["commitment"] == KEY.commitment and record["method"] == "watermark_lora" and record["num_bits"] == 8
    assert "differing_tensors" not in record and record["decoder"] == "keyed" and record["calibration"] == rates
    card = (folder / "README.md").read_text()
    assert "invisible watermark (EW-LoRA, 8 bits)" in card and "- watermark" in card


def test_no_file_has_a_secret(tmp_path: Path) -> None:
    """Exported files contain no secret of a key with a message too long to occur by chance."""
    key = WatermarkKey(bytes(range(90, 122)), 24, b"me", 1)
    vae, config = tiny_vae(), watermark(num_bits=24, num_filters=24, steps=2, commitment=key.commitment)
    embed_watermark(vae, pictures(48), config, key, checkpoint=tmp_path / "run", checkpoint_every=1)
    merge_and_export(vae, tmp_path / "out", config, key)
    bits = "".join("1" if bit else "0" for bit in key.message)
    texts = [key.secret.hex(), bits, ", ".join(bits), str(key.seed("decoder"))]
    secrets = [key.secret, *(text.encode() for text in texts)]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 5
    for path in files:
        content = path.read_bytes()
        assert not any(secret in content for secret in secrets), path


def test_a_pipeline_is_exported_and_keeps_its_autoencoder(kl_marked: Any, tmp_path: Path) -> None:
    pipeline = Pipeline(kl_marked, DDPMScheduler())
    expected = outputs(merged(kl_marked))
    merge_and_export(pipeline, tmp_path / "pipe", CONFIG, KEY)
    assert pipeline.vae is kl_marked
    loaded = AutoencoderKL.from_pretrained(tmp_path / "pipe" / "vae")
    assert torch.equal(outputs(loaded), expected)
    assert (tmp_path / "pipe" / "watermark.json").is_file() and (tmp_path / "pipe" / "scheduler").is_dir()


class Pipeline(DiffusionPipeline):  # type: ignore[misc]
    """Smallest pipeline with an autoencoder."""

    def __init__(self, vae: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(vae=vae, scheduler=scheduler)


def test_an_autoencoder_that_is_not_of_diffusers(tmp_path: Path) -> None:
    vae, config = Plain(), watermark(target_modules=["last"])
    names = set(vae.state_dict())
    embed_watermark(vae, pictures(), config, KEY)
    merge_and_export(vae, tmp_path / "out", config, KEY)
    fresh = Plain()
    fresh.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    torch.testing.assert_close(outputs(fresh), outputs(vae), rtol=0, atol=1e-5)
    assert set(fresh.state_dict()) == names


class Extended(nn.Module):
    """A convolution with a layer that `AutoencoderTiny` lacks."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.extra = layer.weight, layer.bias, nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(nn.functional.conv2d(x, self.weight, self.bias, padding=1))


def extended_vae() -> Any:
    torch.manual_seed(0)
    vae = tiny_vae()
    vae.decoder.layers[0] = Extended(vae.decoder.layers[0])
    return vae


def test_a_modified_autoencoder_is_loaded_as_the_card_says(tmp_path: Path) -> None:
    vae = extended_vae()
    embed_watermark(vae, pictures(32), CONFIG, KEY)
    with pytest.warns(UserWarning, match=r"model: .*`AutoencoderTiny` in 2 tensors, such as .*extra"):
        folder = merge_and_export(vae, tmp_path / "out", CONFIG, KEY)
    differing = json.loads((folder / "watermark.json").read_text())["differing_tensors"]
    assert differing == [f"decoder.layers.0.extra.{name}" for name in ("bias", "weight")]
    card = (folder / "README.md").read_text()
    assert "2 tensors" in card and "model.load_state_dict" in card and "invisible watermark" in card
    loaded = extended_vae()
    loaded.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    torch.testing.assert_close(outputs(loaded), outputs(vae.eval()), rtol=0, atol=1e-5)


def test_a_refused_export_leaves_nothing(embedded: Embedded, tmp_path: Path) -> None:
    vae, target, other = copy.deepcopy(embedded.vae), tmp_path / "out", WatermarkKey(bytes(32), 8)
    cases: list[tuple[Any, Any, WatermarkKey, Any, str]] = [
        (tiny_vae(), CONFIG, KEY, None, "vae has no adapter"),
        (vae, CONFIG, other, None, "key .*config"),
        (vae, watermark(), other, None, "adapter 'watermark' .*another key"),
        ({}, CONFIG, KEY, None, "model is a dict"),
        (vae, CONFIG, KEY, {"oops": KEY.secret.hex()}, "contains the watermark key"),
    ]
    for model, config, key, calibration, named in cases:
        with pytest.raises(ValueError, match=named):
            merge_and_export(model, target, config, key, calibration)
    next(module for module in vae.modules() if isinstance(module, BaseTunerLayer)).merge()
    with pytest.raises(ValueError, match=r"vae .*merged"):
        merge_and_export(vae, target, CONFIG, KEY)
    assert not list(tmp_path.iterdir())
    save_decoder(embedded.report.decoder, KEY, target / "key")
    with pytest.raises(ValueError, match="path="):
        merge_and_export(embedded.vae, target, CONFIG, KEY)


def test_only_adapters_of_embed_watermark_are_exported(kl_marked: Any, tmp_path: Path) -> None:
    """Rank, name and type of the configuration do not make a LoRA a watermark."""
    target, said = tmp_path / "out", "was not trained by embed_watermark"
    lora = {"r": 4, "lora_alpha": 32, "target_modules": r"decoder\.up_blocks\.1\.resnets\.\d+\.conv[12]"}
    one, two, other = kl_vae(), kl_vae(), tiny_vae()
    one.add_adapter(LoraConfig(**lora, init_lora_weights=False), adapter_name="style")
    two.add_adapter(CONFIG.plain_lora(two), adapter_name="watermark")
    inject_adapter_in_model(LoraConfig(target_modules=r"decoder\.layers\.0"), other, adapter_name="watermark")
    for vae, name in ((one, "style"), (two, "watermark"), (other, "watermark")):
        for config in (CONFIG, watermark()):
            with pytest.raises(ValueError, match=f"adapter '{name}' {said}"):
                merge_and_export(vae, target, config, KEY)
    both = copy.deepcopy(kl_marked)  # a copy counts as trained
    with pytest.warns(UserWarning, match="multiple adapters"):  # peft's
        both.add_adapter(LoraConfig(**lora, init_lora_weights=False), adapter_name="style")
    for active in ("style", ["watermark", "style"]):
        both.set_adapters(active)
        with pytest.raises(ValueError, match=f"adapter 'style' {said}"):
            merge_and_export(both, target, watermark(), KEY)
    assert not target.exists()
    both.set_adapters("watermark")
    merge_and_export(both, target, watermark(), KEY)
    assert (target / "watermark.json").is_file()


def test_a_loaded_lora_is_exported_after_embedding_from_the_checkpoint(tmp_path: Path) -> None:
    vae, again = kl_vae(), kl_vae()
    given = {"eval_images": pictures(2), "checkpoint": tmp_path / "run"}
    embed_watermark(vae, pictures(32), CONFIG, KEY, **given)
    vae.save_lora_adapter(tmp_path / "lora", adapter_name="watermark")
    assert all(KEY.commitment.encode() not in path.read_bytes() for path in (tmp_path / "lora").iterdir())
    again.load_lora_adapter(tmp_path / "lora", prefix=None, use_safetensors=True, adapter_name="watermark")
    with pytest.raises(ValueError, match="adapter 'watermark'"):
        merge_and_export(again, tmp_path / "again", CONFIG, KEY)
    again.unload_lora()
    embed_watermark(again, pictures(32), CONFIG, KEY, **given)
    merge_and_export(again, tmp_path / "again", CONFIG, KEY)
    assert torch.equal(outputs(AutoencoderKL.from_pretrained(tmp_path / "again")), outputs(merged(vae)))


def test_merged_images_and_bits_are_the_same(embedded: Embedded) -> None:
    with torch.no_grad():
        images = decode(merged(embedded.vae), embedded.latents)
    torch.testing.assert_close(images, embedded.marked, rtol=0, atol=1e-5)  # rounding of one sum
    assert read_bits(embedded.decoder, images).equal(read_bits(embedded.decoder, embedded.marked))


def test_a_peft_model_can_be_merged_but_not_exported(tmp_path: Path) -> None:
    model = get_peft_model(tiny_vae(), watermark(init_lora_weights=False, lora_alpha=1))
    result = merged(model)
    assert not any(isinstance(module, BaseTunerLayer) for module in result.modules())
    torch.testing.assert_close(outputs(result), outputs(model.get_base_model()), rtol=0, atol=1e-5)
    assert (outputs(result) - outputs(tiny_vae())).abs().max() > 1e-3
    with pytest.raises(ValueError, match="adapter 'default'"):
        merge_and_export(model, tmp_path / "out", CONFIG, KEY)
    assert not (tmp_path / "out").exists()
