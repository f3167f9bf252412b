"""Splitting and joining LoRAs of matrices that hold several modules, magnitudes of DoRA, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_zoo.merge import convert
from peft_zoo.merge.formats.fused import join, split
from peft_zoo.merge.formats.lora import Lora
from tests.merge.formats.models import assert_equal, factors, save_lora

QKV = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]
FUSED = "lora_unet_double_blocks_0_img_attn_qkv"


def lora(rows: int, rank: int, A: Tensor | None = None) -> Lora:
    A = torch.randn(rank, 5) if A is None else A
    return Lora(torch.randn(rows, rank), A, 0.5)


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 3), (3, 1, 1), (4, 4, 1)])
@pytest.mark.parametrize("missing", [None, 0, 1, 2])
def test_splitting_inverts_joining(ranks: tuple[int, int, int], missing: int | None) -> None:
    loras = [None if i == missing else lora(4, r) for i, r in enumerate(ranks)]
    whole = join(loras, [4, 4, 4])
    assert whole.rank == sum(r for i, r in enumerate(ranks) if i != missing)
    for one, other in zip(loras, split(whole, [4, 4, 4]), strict=True):
        if one is None or other is None:
            assert one is other
        else:
            assert torch.equal(one.B, other.B) and torch.equal(one.A, other.A) and one.scale == other.scale


def test_modules_with_one_A_keep_its_rank() -> None:
    A = torch.randn(3, 5)
    loras = [lora(rows, 3, A.clone()) for rows in (2, 2, 2, 8)]
    whole = join(loras, [2, 2, 2, 8])
    assert whole.rank == 3 and torch.equal(whole.B, torch.cat([each.B for each in loras]))
    assert all(each is not None and torch.equal(each.A, A) for each in split(whole, [2, 2, 2, 8]))


def test_untrained_modules_are_kept() -> None:
    whole = Lora(torch.zeros(6, 2), torch.randn(2, 5), 1.0)
    assert all(each is not None for each in split(whole, [2, 2, 2]))


def test_what_the_file_has_comes_back(tmp_path: Path) -> None:
    tensors = {
        f"{FUSED}.lora_down.weight": torch.randn(4, 16).half(),
        f"{FUSED}.lora_up.weight": torch.randn(48, 4).half(),
    }
    save_file({**tensors, f"{FUSED}.alpha": torch.tensor(3.0).half()}, tmp_path / "k.safetensors", {"format": "pt"})
    convert(tmp_path / "k.safetensors", tmp_path / "peft", family="flux")
    assert list(factors(tmp_path / "peft")) == sorted(QKV)
    convert(tmp_path / "peft", tmp_path / "again.safetensors", to="kohya", family="flux", part="transformer")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "k.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda name: 5.0 if name.endswith("to_q") else 2.0, "scales"),
        (lambda name: 2.0, None),
    ],
)
def test_scales_of_one_matrix_must_agree(change: Callable[[str], float], field: str | None, tmp_path: Path) -> None:
    adapter = save_lora(tmp_path / "peft", dict.fromkeys(QKV, (8, 8)), alpha=change)
    target = tmp_path / "k.safetensors"
    if field is None:
        convert(adapter, target, to="kohya", family="flux", part="transformer")
        return
    with pytest.raises(NotImplementedError, match=field):
        convert(adapter, target, to="kohya", family="flux", part="transformer")
    assert not target.exists()


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    adapter = save_lora(tmp_path / "peft", {QKV[0]: (8, 8), QKV[1]: (6, 8)})
    with pytest.raises(ValueError, match="to_k: has 6 rows instead of 8"):
        convert(adapter, tmp_path / "k.safetensors", to="kohya", family="flux", part="transformer")
    tensors = {f"{FUSED}.lora_down.weight": torch.randn(4, 16), f"{FUSED}.lora_up.weight": torch.randn(49, 4)}
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="49 rows"):
        convert(tmp_path / "odd.safetensors", tmp_path / "back", family="flux")


def dora(tmp_path: Path) -> Path:
    """A DoRA of a UNet's linear layer and convolution."""
    import peft

    model = torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(4, 6, 3), "conv_out": torch.nn.Conv2d(6, 4, 1)})
    config = peft.LoraConfig(r=2, target_modules=["conv_in", "conv_out"], use_dora=True, init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "dora"))
    return tmp_path / "dora"


@pytest.mark.parametrize("to", ["kohya", "comfy", "diffusers"])
def test_magnitudes_are_kept(to: str, tmp_path: Path) -> None:
    adapter, file = dora(tmp_path), tmp_path / "file.safetensors"
    convert(adapter, file, to=to, family="sd", part="unet")
    if to == "kohya":
        assert load_file(file)["lora_unet_conv_in.dora_scale"].shape == (6, 1, 1, 1)
    convert(file, tmp_path / "back", family="sd")
    assert_equal(adapter, tmp_path / "back")
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "back"))
    assert one.keys() == other.keys()
    assert all(one[key].shape == other[key].shape and torch.equal(one[key], other[key]) for key in one)
    convert(adapter, tmp_path / "plain.safetensors", to=to, family="sd", part="unet", drop=["magnitude"])
    assert not any("dora" in key or "magnitude" in key for key in load_file(tmp_path / "plain.safetensors"))


def test_magnitudes_by_columns_are_refused(tmp_path: Path) -> None:
    name = "lora_unet_time_embedding_linear_1"
    tensors = {f"{name}.lora_down.weight": torch.randn(2, 8), f"{name}.lora_up.weight": torch.randn(8, 2)}
    save_file({**tensors, f"{name}.dora_scale": torch.ones(1, 8)}, tmp_path / "k.safetensors")
    with pytest.raises(NotImplementedError, match="dora_scale"):
        convert(tmp_path / "k.safetensors", tmp_path / "peft", family="sd")


def test_magnitudes_of_some_modules_are_refused(tmp_path: Path) -> None:
    tensors = {}
    for name in ("lora_unet_time_embedding_linear_1", "lora_unet_time_embedding_linear_2"):
        tensors |= {f"{name}.lora_down.weight": torch.randn(2, 8), f"{name}.lora_up.weight": torch.randn(8, 2)}
    save_file({**tensors, f"{name}.dora_scale": torch.ones(8, 1)}, tmp_path / "k.safetensors")
    with pytest.raises(NotImplementedError, match=r"linear_1: has no magnitudes"):
        convert(tmp_path / "k.safetensors", tmp_path / "peft", family="sd")
    assert not (tmp_path / "peft").exists()


def test_changed_weights_and_biases_are_refused_unless_dropped(tmp_path: Path) -> None:
    name = "diffusion_model.blocks.0.self_attn.q"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 8), f"{name}.lora_B.weight": torch.randn(8, 2)}
    save_file({**tensors, f"{name}.diff_b": torch.ones(8)}, tmp_path / "c.safetensors")
    with pytest.raises(NotImplementedError, match="diff_b"):
        convert(tmp_path / "c.safetensors", tmp_path / "peft")
    report = convert(tmp_path / "c.safetensors", tmp_path / "peft", drop=[".diff_b"])
    assert report.modules == {"": 1} and list(factors(tmp_path / "peft")) == ["blocks.0.attn1.to_q"]


def test_biases_of_an_adapter_are_refused(tmp_path: Path) -> None:
    import peft

    model = torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(4, 6, 3)})
    config = peft.LoraConfig(r=2, target_modules=["conv_in"], lora_bias=True)
    with warnings.catch_warnings():  # peft takes its own biases for what DeepSpeed left
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "peft"))
    with pytest.raises(ValueError, match="lora_bias"):
        convert(tmp_path / "peft", tmp_path / "k.safetensors", to="kohya", family="sd", part="unet")
