"""Exported autoencoders: the mark is in the weights, the key is not in the files, and the model is as it was."""

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

from benchmarks.watermark.taef2 import taef2, untrained
from peft_zoo.tasks.watermark.export import merge_and_export, merged
from peft_zoo.tasks.watermark.vae import decode, encode
from peft_zoo.watermark import EmbedReport, WatermarkKey, embed_watermark, save_decoder, verify_watermark
from tests.tasks.watermark.samples import KEY, kl_vae, pictures, tiny_vae, watermark

CONFIG = watermark(steps=40, commitment=KEY.commitment)


@pytest.fixture(scope="module")
def marked() -> tuple[Any, EmbedReport]:
    vae = tiny_vae()
    return vae, embed_watermark(vae, pictures(48), CONFIG, KEY)


def outputs(vae: Any) -> torch.Tensor:
    with torch.no_grad():
        return decode(vae, encode(vae, pictures(9, seed=4)))


def test_what_is_exported_carries_the_mark_without_peft(marked: tuple[Any, EmbedReport], tmp_path: Path) -> None:
    vae, report = marked
    before = outputs(vae)
    folder = merge_and_export(vae, tmp_path / "out", CONFIG, KEY, calibration={"fpr": 0.01, "measured": 0.009})
    assert torch.equal(outputs(vae), before) and any(isinstance(m, BaseTunerLayer) for m in vae.modules())
    loaded = AutoencoderTiny.from_pretrained(folder)
    assert not any(isinstance(module, BaseTunerLayer) for module in loaded.modules())
    assert loaded.state_dict().keys() == tiny_vae().state_dict().keys()
    torch.testing.assert_close(outputs(loaded), before, rtol=0, atol=1e-5)  # one sum of two products, rounded
    assert verify_watermark(outputs(loaded), KEY, decoder=report.decoder, fpr=0.01).decision
    record = json.loads((folder / "watermark.json").read_text())
    assert record["commitment"] == KEY.commitment and record["method"] == "watermark_lora" and record["num_bits"] == 8
    assert (
        "differing_tensors" not in record
        and record["decoder"] == "keyed"
        and record["calibration"] == {"fpr": 0.01, "measured": 0.009}
    )
    card = (folder / "README.md").read_text()
    assert "invisible watermark (EW-LoRA, 8 bits)" in card and "- watermark" in card


def test_nothing_secret_is_in_any_file(tmp_path: Path) -> None:
    """With a key long enough for its message not to stand anywhere by chance."""
    key = WatermarkKey(bytes(range(90, 122)), 24, b"me", 1)
    vae, config = tiny_vae(), watermark(num_bits=24, num_filters=24, commitment=key.commitment)
    embed_watermark(vae, pictures(48), config, key, checkpoint=tmp_path / "run", checkpoint_every=1)
    merge_and_export(vae, tmp_path / "out", config, key)
    bits = "".join("1" if bit else "0" for bit in key.message)
    secrets = [
        key.secret,
        key.secret.hex().encode(),
        bits.encode(),
        ", ".join(bits).encode(),
        str(key.seed("decoder")).encode(),
    ]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 5
    for path in files:
        content = path.read_bytes()
        assert not any(secret in content for secret in secrets), path


def test_a_pipeline_is_exported_whole_and_keeps_its_own(marked: tuple[Any, EmbedReport], tmp_path: Path) -> None:
    vae = kl_vae()
    embed_watermark(vae, pictures(40), watermark(), KEY)
    pipeline = Pipeline(vae, DDPMScheduler())
    expected = outputs(merged(vae))
    merge_and_export(pipeline, tmp_path / "pipe", watermark(), KEY)
    assert pipeline.vae is vae
    loaded = AutoencoderKL.from_pretrained(tmp_path / "pipe" / "vae")
    assert torch.equal(outputs(loaded), expected)
    assert (tmp_path / "pipe" / "watermark.json").is_file() and (tmp_path / "pipe" / "scheduler").is_dir()


class Pipeline(DiffusionPipeline):  # type: ignore[misc]
    """The least that has an autoencoder."""

    def __init__(self, vae: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(vae=vae, scheduler=scheduler)


def test_a_module_of_one_s_own(tmp_path: Path) -> None:
    from tests.tasks.watermark.test_embed import Plain

    vae, config = Plain(), watermark(target_modules=["last"])
    names = set(vae.state_dict())
    embed_watermark(vae, pictures(), config, KEY)
    merge_and_export(vae, tmp_path / "out", config, KEY)
    from safetensors.torch import load_file

    fresh = Plain()
    fresh.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    torch.testing.assert_close(outputs(fresh), outputs(vae), rtol=0, atol=1e-5)
    assert set(fresh.state_dict()) == names


def test_an_autoencoder_that_its_class_does_not_know_is_loaded_as_the_card_says(tmp_path: Path) -> None:
    """TAEF2 is an `AutoencoderTiny` with blocks that the class has not."""
    torch.manual_seed(0)
    vae = untrained()
    embed_watermark(vae, pictures(), watermark(), KEY)
    with pytest.warns(UserWarning, match=r"a new `AutoencoderTiny` in 24 tensors, such as .*pool.* Build the model"):
        folder = merge_and_export(vae, tmp_path / "out", watermark(), KEY)
    differing = json.loads((folder / "watermark.json").read_text())["differing_tensors"]
    assert len(differing) == 24 and all(".pool." in name for name in differing)
    card = (folder / "README.md").read_text()
    assert "24 tensors" in card and "model.load_state_dict" in card and "invisible watermark" in card
    torch.testing.assert_close(outputs(taef2(folder)), outputs(vae.eval()), rtol=0, atol=1e-5)


def test_what_is_refused_leaves_nothing(marked: tuple[Any, EmbedReport], tmp_path: Path) -> None:
    vae, report = marked
    target = tmp_path / "out"
    with pytest.raises(ValueError, match="vae has no adapter: embed a watermark first"):
        merge_and_export(tiny_vae(), target, CONFIG, KEY)
    with pytest.raises(ValueError, match="is not the configuration's: give the one used"):
        merge_and_export(vae, target, CONFIG, WatermarkKey(bytes(32), 8))
    with pytest.raises(ValueError, match="adapter 'watermark' carries the message of another key"):
        merge_and_export(vae, target, watermark(), WatermarkKey(bytes(32), 8))
    with pytest.raises(ValueError, match="model is a dict without a vae"):
        merge_and_export({}, target, CONFIG, KEY)
    with pytest.raises(ValueError, match="contains the watermark key"):
        merge_and_export(vae, target, CONFIG, KEY, calibration={"oops": KEY.secret.hex()})
    layer = next(module for module in vae.modules() if isinstance(module, BaseTunerLayer))
    layer.merge()
    with pytest.raises(ValueError, match="an adapter that is merged, disabled or not active"):
        merge_and_export(vae, target, CONFIG, KEY)
    layer.unmerge()
    assert not list(tmp_path.iterdir())
    save_decoder(report.decoder, KEY, target / "key")
    with pytest.raises(ValueError, match=r"path=.* exists and is not an empty folder"):
        merge_and_export(vae, target, CONFIG, KEY)


def test_only_what_was_trained_as_a_watermark_is_exported(tmp_path: Path) -> None:
    """Whatever its rank, its name and the type of its configuration say."""
    target, said = tmp_path / "out", "was not trained by embed_watermark since the model was loaded"
    lora = {"r": 4, "lora_alpha": 32, "target_modules": r"decoder\.up_blocks\.1\.resnets\.\d+\.conv[12]"}
    one, two, other = kl_vae(), kl_vae(), tiny_vae()
    one.add_adapter(LoraConfig(**lora, init_lora_weights=False), adapter_name="style")
    two.add_adapter(CONFIG.plain_lora(two), adapter_name="watermark")
    inject_adapter_in_model(LoraConfig(target_modules=r"decoder\.layers\.0"), other, adapter_name="watermark")
    for vae, name in ((one, "style"), (two, "watermark"), (other, "watermark")):
        for config in (CONFIG, watermark()):
            with pytest.raises(ValueError, match=f"adapter '{name}' {said}"):
                merge_and_export(vae, target, config, KEY)
    both = kl_vae()
    embed_watermark(both, pictures(), watermark(), KEY)
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


def test_a_copy_is_still_known_as_marked_and_a_saved_lora_is_not(
    marked: tuple[Any, EmbedReport], tmp_path: Path
) -> None:
    merge_and_export(copy.deepcopy(marked[0]), tmp_path / "out", CONFIG, KEY)
    vae, again = kl_vae(), kl_vae()
    embed_watermark(vae, pictures(), CONFIG, KEY, checkpoint=tmp_path / "run")
    vae.save_lora_adapter(tmp_path / "lora", adapter_name="watermark")
    assert all(KEY.commitment.encode() not in path.read_bytes() for path in (tmp_path / "lora").iterdir())
    again.load_lora_adapter(tmp_path / "lora", prefix=None, use_safetensors=True, adapter_name="watermark")
    with pytest.raises(ValueError, match=r"embed here, which from a checkpoint .* takes no time"):
        merge_and_export(again, tmp_path / "again", CONFIG, KEY)
    again.unload_lora()
    embed_watermark(again, pictures(), CONFIG, KEY, checkpoint=tmp_path / "run")
    merge_and_export(again, tmp_path / "again", CONFIG, KEY)
    assert torch.equal(outputs(AutoencoderKL.from_pretrained(tmp_path / "again")), outputs(merged(vae)))


def test_models_that_peft_has_wrapped(marked: tuple[Any, EmbedReport], tmp_path: Path) -> None:
    """A `PeftModel` can be merged; but what it trains is no mark of `embed_watermark`."""
    model = get_peft_model(tiny_vae(), watermark(init_lora_weights=False, lora_alpha=1))
    result = merged(model)
    assert not any(isinstance(module, BaseTunerLayer) for module in result.modules())
    torch.testing.assert_close(outputs(result), outputs(model.get_base_model()), rtol=0, atol=1e-5)
    assert (outputs(result) - outputs(tiny_vae())).abs().max() > 1e-3
    with pytest.raises(ValueError, match="adapter 'default' was not trained by embed_watermark"):
        merge_and_export(model, tmp_path / "out", CONFIG, KEY)
    assert not (tmp_path / "out").exists()
