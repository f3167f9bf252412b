"""What stock diffusers and peft read of a squeezed file is what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_zoo.merge.squeeze.api import squeeze_adapter
from tests.merge.models import deepseek, gpt2, llama, mixtral, qwen, t5

Parts = dict[str, tuple[str, nn.Module, list[str]]]


def text_encoder(cls: str) -> nn.Module:
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(vocab_size=50, projection_dim=8, max_position_embeddings=16, **sizes)
    encoder: nn.Module = getattr(transformers, cls)(config)
    return encoder


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (8,), "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 2}
    model: nn.Module = UNet2DConditionModel(sample_size=8, layers_per_block=1, **sizes, **blocks)
    return model


def pipeline(kind: str) -> Any:
    import diffusers

    scheduler, first = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), text_encoder("CLIPTextModel")
    if kind == "SD":
        return diffusers.StableDiffusionPipeline(
            None, first, None, unet(), scheduler, None, None, requires_safety_checker=False
        )
    second = text_encoder("CLIPTextModelWithProjection")
    return diffusers.StableDiffusionXLPipeline(None, first, second, None, None, unet(), scheduler)


def kohya(pipe: Any, kind: str, alpha: str) -> dict[str, Tensor]:
    """A file of sd-scripts for the attention layers of a pipeline, with spectra that differ between modules."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    if kind == "SDXL":
        prefixes |= {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    file: dict[str, Tensor] = {}
    for part, prefix in prefixes.items():
        targets = ["to_q", "to_v"] if part == "unet" else ["q_proj", "out_proj"]
        model = get_peft_model(getattr(pipe, part), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        for place, (key, value) in enumerate(sorted(get_peft_model_state_dict(model).items())):
            base = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
            if part != "unet" and not base.startswith("text_model"):
                base = f"text_model.{base}"
            name = prefix + base.replace(".", "_")
            if "lora_A" in key:
                decay = torch.tensor([1, 0.5, 0.3, 0.2])[:, None] ** (0.2, 2, 4)[place % 3]
                value = torch.linalg.qr(value.T)[0].T * decay
            file[name + (".lora_down.weight" if "lora_A" in key else ".lora_up.weight")] = value.contiguous()
            if alpha == "all" or (alpha == "some" and place % 4 == 0):
                file[f"{name}.alpha"] = torch.tensor(2.0)
        model.unload()
    return file


def updates(pipe: Any) -> dict[str, Tensor]:
    return {
        name.replace("text_model.", ""): module.get_delta_weight("x").detach()
        for part in ("unet", "text_encoder", "text_encoder_2")
        if getattr(pipe, part, None) is not None
        for name, module in ((f"{part}.{name}", module) for name, module in getattr(pipe, part).named_modules())
        if "x" in getattr(module, "lora_A", {})
    }


def written(path: Path) -> list[float]:
    """Norms of all updates of a file, by the rule of sd-scripts."""
    from safetensors.torch import load_file

    file = load_file(path)
    norms = []
    for key in file:
        if key.endswith(".lora_down.weight"):
            name, A = key.removesuffix(".lora_down.weight"), file[key].double()
            alpha = float(file.get(f"{name}.alpha", len(A)))
            norms.append((alpha / len(A) * (file[f"{name}.lora_up.weight"].double() @ A)).norm().item())
    return sorted(norms)


@pytest.mark.parametrize(("kind", "alpha"), [("SD", "all"), ("SDXL", "all"), ("SDXL", "some"), ("SDXL", "none")])
def test_diffusers_reads_what_was_written(kind: str, alpha: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pipe = pipeline(kind)
    save_file(kohya(pipe, kind, alpha), tmp_path / "in.safetensors")
    for place, how in enumerate(({"energy": 0.97}, {"energy": 0.97, "scaling": "keep"})):
        report = squeeze_adapter(tmp_path / "in.safetensors", tmp_path / f"{place}.safetensors", **how)
        assert len({module.new_rank for module in report.modules}) > 1
        pipe.load_lora_weights(str(tmp_path / f"{place}.safetensors"), adapter_name="x")
        read = sorted(update.double().norm().item() for update in updates(pipe).values())
        assert read == pytest.approx(written(tmp_path / f"{place}.safetensors"), rel=1e-5)
        assert len(read) == len(report.modules)
        pipe.unload_lora_weights()


def experts(folder: Path, path: str, names: tuple[str, ...]) -> Path:
    """A LoRA of single experts and of attention, as transformers 4 had them."""
    torch.manual_seed(1)
    folder.mkdir()
    modules = [f"{path}.experts.{expert}.{name}" for expert in range(4) for name in names] + ["self_attn.q_proj"]
    state = {}
    for place, module in enumerate(f"model.layers.{layer}.{module}" for layer in range(2) for module in modules):
        decay = torch.arange(1, 5.0)[:, None] ** -(0.2 + place % 4)
        state[f"base_model.model.{module}.lora_A.weight"] = (torch.linalg.qr(torch.randn(32, 4))[0].T * decay).clone()
        state[f"base_model.model.{module}.lora_B.weight"] = torch.randn(32, 4) * 0.3
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [*names, "q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    return folder


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # of peft about its own patterns
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")
@pytest.mark.parametrize(
    ("base", "path", "names"),
    [
        (mixtral, "block_sparse_moe", ("w1", "w2", "w3")),
        (qwen, "mlp", ("gate_proj", "down_proj", "up_proj")),
    ],
)
def test_stacked_experts_get_one_rank(
    base: Callable[[], nn.Module], path: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    source, ids = experts(tmp_path / "in", path, names), torch.arange(10)[None]

    def outputs(folder: Path) -> Tensor:
        with torch.no_grad():
            logits: Tensor = PeftModel.from_pretrained(base(), str(folder)).eval()(ids).logits
        return logits

    before = outputs(source)
    report = squeeze_adapter(source, tmp_path / "all", energy=0.999_999)
    assert len({module.new_rank for module in report.modules if "experts" in module.name}) == 1
    torch.testing.assert_close(outputs(tmp_path / "all"), before, atol=1e-2, rtol=0)
    report = squeeze_adapter(source, tmp_path / "few", budget=4000)
    assert report.params_after <= 4000 and outputs(tmp_path / "few").isfinite().all()


def test_what_peft_would_move_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"shared_experts": nn.ModuleDict({"down_proj": nn.Linear(8, 8)})})})
    config = LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(str(tmp_path / "in"))
    with pytest.raises(NotImplementedError, match="shared_experts"):
        squeeze_adapter(tmp_path / "in", tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("targets", [["down_proj", "q_b_proj"], ["q_b_proj"]])
def test_a_finished_schedule_loads_as_what_it_was(targets: list[str], tmp_path: Path) -> None:
    from peft_zoo import SqueezeLoraConfig
    from peft_zoo.squeeze_lora import finalize_squeeze

    ids, config = torch.arange(10)[None], SqueezeLoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(deepseek(), config).eval()
    with pytest.warns(UserWarning, match="down_proj") if "down_proj" in targets else nullcontext():
        finalize_squeeze(model)
    model.save_pretrained(str(tmp_path / "out"))
    again = PeftModel.from_pretrained(deepseek(), str(tmp_path / "out")).eval()
    assert (again.peft_config["default"].peft_type == "LORA") == ("down_proj" not in targets)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("base", "targets"),
    [(llama, "all-linear"), (gpt2, r".*\.(c_attn|c_fc)"), (t5, ["q", "wo"])],
)
def test_squeezed_adapters_load_in_stock_peft(base: Callable[[], Any], targets: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, fan_in_fan_out=base is gpt2)
    model = get_peft_model(base(), config).eval()
    for name, parameter in model.named_parameters():  # spectra that differ, so that the ranks do
        if "lora_B" in name:
            parameter.data[:, 2 + len(name) % 2 :] *= 1e-7
    model.save_pretrained(str(tmp_path / "in"))
    report = squeeze_adapter(tmp_path / "in", tmp_path / "out", energy=1 - 1e-10)
    assert all(module.new_rank < 4 for module in report.modules)
    again, ids = PeftModel.from_pretrained(base(), str(tmp_path / "out")).eval(), torch.arange(10)[None]
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if base is t5 else {})}
    assert {name for name, _ in again.named_parameters() if "lora" in name} == {
        name for name, _ in model.named_parameters() if "lora" in name
    }
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model.eval()(**inputs).logits, atol=1e-4, rtol=0)
