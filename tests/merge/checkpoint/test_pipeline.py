"""Models and pipelines of diffusers: the merged files are those of loading, merging with peft and saving."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    ModelMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import CLIPTextConfig, CLIPTextModel

from peft_zoo.io.checkpoint import Checkpoint
from peft_zoo.merge import extract_lora, merge_checkpoint
from tests.merge.checkpoint.conftest import differing, tensors

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "time_emb_proj"]
TEXT = ["q_proj", "out_proj"]


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )


def text_encoder() -> CLIPTextModel:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    return CLIPTextModel(CLIPTextConfig(**size, vocab_size=32, max_position_embeddings=8))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pipeline with random weights, a README and weights in one file beside its components."""
    folder = tmp_path_factory.mktemp("pipeline") / "base"
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    parts: dict[str, Any] = {"vae": vae, "text_encoder": text_encoder(), "unet": unet(), "tokenizer": None}
    more: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    more["scheduler"] = DDIMScheduler(steps_offset=1, clip_sample=False)
    StableDiffusionPipeline(**parts, **more).save_pretrained(folder)
    (folder / "README.md").write_text("of the base")
    (folder / "whole.safetensors").write_bytes(b"weights from before the merge")
    return folder


def load(folder: Path) -> Any:
    kind: Any = CLIPTextModel if folder.name == "text_encoder" else UNet2DConditionModel
    with Checkpoint(folder) as source:
        dtype = next(iter(source.tensors.values())).dtype
    return kind.from_pretrained(folder, **{"dtype" if kind is CLIPTextModel else "torch_dtype": dtype})


def adapter(part: Path, folder: Path, config: Any) -> Path:
    """Folder of an adapter of one component whose trained parameters are random."""
    torch.manual_seed(1)
    model = get_peft_model(load(part), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


def in_memory(part: Path, given: Path, out: Path) -> dict[str, torch.Tensor]:
    """The tensors in the files of a merge by peft, saved by diffusers or transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(load(part), given).merge_and_unload().save_pretrained(out)
    return tensors(out)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_model_as_diffusers_saves_it(dtype: torch.dtype, pipeline: Path, tmp_path: Path) -> None:
    base = tmp_path / "unet"
    load(pipeline / "unet").to(dtype).save_pretrained(base, max_shard_size="60kB")
    given = adapter(base, tmp_path / "lora", LoraConfig(r=4, target_modules=ATTENTION, alpha_pattern={"to_k": 3}))
    report = merge_checkpoint(base, given, tmp_path / "out")
    expected = in_memory(base, given, tmp_path / "expected")
    assert differing(tensors(tmp_path / "out"), expected) == []
    assert len(report.tensors) > 20 and differing(tensors(base), expected)
    assert set(files(base)) == files(tmp_path / "out").keys() - {"merge_report.json"}
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()
    assert isinstance(load(tmp_path / "out"), ModelMixin)


@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=2, target_modules=["to_q", "conv1"], use_dora=True), LoHaConfig(r=2, target_modules=["to_v"])],
    ids=["dora", "loha"],
)
def test_other_types(config: Any, pipeline: Path, tmp_path: Path) -> None:
    given = adapter(pipeline / "unet", tmp_path / "adapter", config)
    merge_checkpoint(pipeline / "unet", given, tmp_path / "out")
    assert differing(tensors(tmp_path / "out"), in_memory(pipeline / "unet", given, tmp_path / "expected")) == []


def test_a_transformer(tmp_path: Path) -> None:
    """Some of its parameters stay in float32 beside others in bfloat16."""
    size = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "ffn_dim": 32, "num_layers": 1}
    WanTransformer3DModel(**size).save_pretrained(tmp_path / "first")

    def load_wan(folder: Path) -> Any:
        return WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)

    load_wan(tmp_path / "first").save_pretrained(tmp_path / "base")
    assert {tensor.dtype for tensor in tensors(tmp_path / "base").values()} == {torch.float32, torch.bfloat16}
    config = LoraConfig(r=4, target_modules=["to_q", "ffn.net.2", "proj_out"], init_lora_weights=False)
    model = get_peft_model(load_wan(tmp_path / "base"), config)
    model.save_pretrained(tmp_path / "lora")
    merge_checkpoint(tmp_path / "base", tmp_path / "lora", tmp_path / "out")
    adapted = PeftModel.from_pretrained(load_wan(tmp_path / "base"), tmp_path / "lora")
    adapted.merge_and_unload().save_pretrained(tmp_path / "expected")
    assert differing(tensors(tmp_path / "out"), tensors(tmp_path / "expected")) == []
    with pytest.raises(NotImplementedError, match="diffusers"):
        extract_lora(tmp_path / "base", tmp_path / "out", tmp_path / "other", rank=4)


def test_convolutions(pipeline: Path, tmp_path: Path) -> None:
    """peft computes the update of a kernel as a convolution, which rounds differently unless its bits are asked for."""
    base = pipeline / "unet"
    given = adapter(base, tmp_path / "lora", LoraConfig(r=4, target_modules=["conv1", "conv_in"]))
    expected = in_memory(base, given, tmp_path / "expected")
    merge_checkpoint(base, given, tmp_path / "exact")
    torch.testing.assert_close(tensors(tmp_path / "exact"), expected, atol=1e-6, rtol=0)
    merge_checkpoint(base, given, tmp_path / "bits", arithmetic="peft")
    assert differing(tensors(tmp_path / "bits"), expected) == []


@pytest.mark.parametrize("shard", ["60kB", "1GB"])
def test_a_variant_keeps_its_names(shard: str, pipeline: Path, tmp_path: Path) -> None:
    base = tmp_path / "unet"
    load(pipeline / "unet").half().save_pretrained(base, max_shard_size=shard, variant="fp16")
    given = adapter(pipeline / "unet", tmp_path / "lora", LoraConfig(r=4, target_modules=["to_q"]))
    merge_checkpoint(base, given, tmp_path / "out")
    assert files(base).keys() == files(tmp_path / "out").keys() - {"merge_report.json"}
    changed = UNet2DConditionModel.from_pretrained(tmp_path / "out", variant="fp16", torch_dtype=torch.float16)
    assert changed.state_dict().keys() == tensors(base).keys()
    load(pipeline / "unet").save_pretrained(base, variant="ema")
    with pytest.raises(ValueError, match="variants ema, fp16"):
        merge_checkpoint(base, given, tmp_path / "other")


def test_parts_of_a_pipeline(pipeline: Path, tmp_path: Path) -> None:
    given = tmp_path / "lora"
    adapter(pipeline / "unet", given / "unet", LoraConfig(r=4, target_modules=ATTENTION))
    adapter(pipeline / "text_encoder", given / "text_encoder", LoraConfig(r=2, target_modules=TEXT))
    plan = merge_checkpoint(pipeline, given, tmp_path / "out", dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    report = merge_checkpoint(pipeline, given, tmp_path / "out")
    assert [row.key for row in plan.tensors] == [row.key for row in report.tensors]
    assert {row.key.partition(".")[0] for row in report.tensors} == {"unet", "text_encoder"}
    assert len(report.warnings) == 1 and "whole.safetensors" in report.warnings[0]
    for part in ("unet", "text_encoder"):
        expected = in_memory(pipeline / part, given / part, tmp_path / part)
        assert differing(tensors(tmp_path / "out" / part), expected) == []
        assert differing(tensors(pipeline / part), expected)
    before, after = files(pipeline), files(tmp_path / "out")
    assert json.loads(after.pop("merge_report.json")) == report.to_dict() | {"warnings": list(report.warnings)} | {
        "tensors": [{**row, "adapters": list(row["adapters"])} for row in report.to_dict()["tensors"]]
    }
    assert before.keys() - after.keys() == {"README.md", "whole.safetensors"}
    assert {name for name in after if after[name] != before[name]} == {
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (pipeline / vae).stat().st_ino == (tmp_path / "out" / vae).stat().st_ino


def test_the_component_is_told_by_the_modules(pipeline: Path, tmp_path: Path) -> None:
    one = adapter(pipeline / "unet", tmp_path / "style", LoraConfig(r=4, target_modules=["to_q"]))
    two = adapter(pipeline / "text_encoder", tmp_path / "subject", LoraConfig(r=2, target_modules=TEXT))
    report = merge_checkpoint(pipeline, {one: 0.5, two: 2.0}, tmp_path / "out")
    assert {(row.key.partition(".")[0], row.adapters) for row in report.tensors} == {
        ("unet", ("style",)),
        ("text_encoder", ("subject",)),
    }


def test_refusals_of_pipelines(pipeline: Path, tmp_path: Path) -> None:
    given = adapter(pipeline / "unet", tmp_path / "lora" / "unet", LoraConfig(r=4, target_modules=["to_q"]))
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        merge_checkpoint(pipeline, tmp_path / "empty", out)
    shutil.copytree(given, tmp_path / "lora" / "prior")
    with pytest.raises(ValueError, match="'prior'"):
        merge_checkpoint(pipeline, tmp_path / "lora", out)
    twice = tmp_path / "twice"
    shutil.copytree(pipeline, twice)
    shutil.copytree(twice / "unet", twice / "unet_2")
    index = json.loads((twice / "model_index.json").read_text())
    (twice / "model_index.json").write_text(json.dumps({**index, "unet_2": index["unet"]}))
    with pytest.raises(ValueError, match="unet and unet_2"):
        merge_checkpoint(twice, given, out)
    shutil.rmtree(twice / "unet"), shutil.rmtree(twice / "unet_2")
    with pytest.raises(ValueError, match="fits none of"):
        merge_checkpoint(twice, given, out)
    with pytest.raises(ValueError, match="out="):
        merge_checkpoint(pipeline, given, twice)
    assert not out.exists() and not list(tmp_path.glob(".unfinished*"))


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, ValueError, "_class_name"),
        ({"_class_name": ["UNet2DModel"]}, ValueError, "_class_name"),
        ({"_class_name": "my_code.UNet"}, ValueError, "_class_name"),
        ({"layers_per_block": 10**9}, ValueError, "layers_per_block"),
        ({"cross_attention_dim": 32}, ValueError, "attn2"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, NotImplementedError, "quantization_config"),
    ],
)
def test_refused_models(change: dict[str, Any], error: Any, named: str, pipeline: Path, tmp_path: Path) -> None:
    given = adapter(pipeline / "unet", tmp_path / "lora", LoraConfig(r=4, target_modules=["to_q"]))
    shutil.copytree(pipeline / "unet", tmp_path / "unet")
    config = json.loads((tmp_path / "unet/config.json").read_text())
    (tmp_path / "unet/config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(error, match=named):
        merge_checkpoint(tmp_path / "unet", given, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "unet"]
