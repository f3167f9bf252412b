"""Files of LyCORIS as adapters of peft: updates by the formulas, scaled once."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_zoo.merge import convert
from tests.merge.formats.models import factors, read_config

CONV, LINEAR = "down_blocks.0.resnets.0.conv1", "time_embedding.linear_1"
FLAT = {CONV: f"lora_unet_{CONV.replace('.', '_')}", LINEAR: "lora_unet_time_embedding_linear_1"}


class Model(nn.Module):
    """The two layers that the files are for, under their names."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(8, 12)})
        resnet = nn.ModuleDict({"conv1": nn.Conv2d(8, 12, 3)})
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"resnets": nn.ModuleList([resnet])})])


def random(*shape: int) -> Tensor:
    return torch.randn(shape) / 2


def converted(tmp_path: Path, tensors: dict[str, dict[str, Tensor]], **options: Any) -> dict[str, Tensor]:
    """Updates of the modules when peft has loaded what `convert` made of a file."""
    flat = {f"{FLAT[module]}.{end}": tensor for module, own in tensors.items() for end, tensor in own.items()}
    save_file(flat, tmp_path / "l.safetensors")
    convert(tmp_path / "l.safetensors", tmp_path / "peft", family="sd", **options)
    model = peft.PeftModel.from_pretrained(Model(), str(tmp_path / "peft"))
    return {name: model.get_submodule(f"base_model.model.{name}").get_delta_weight("default") for name in tensors}


def test_loha(tmp_path: Path) -> None:
    own = {"hada_w1_a": random(12, 2), "hada_w1_b": random(2, 8), "hada_w2_a": random(12, 2), "hada_w2_b": random(2, 8)}
    conv = {
        **{f"hada_w{i}_a": random(3, 12) for i in (1, 2)},
        **{f"hada_w{i}_b": random(3, 8) for i in (1, 2)},
        **{f"hada_t{i}": random(3, 3, 3, 3) for i in (1, 2)},
    }
    found = converted(
        tmp_path, {LINEAR: {**own, "alpha": torch.tensor(1.0)}, CONV: {**conv, "alpha": torch.tensor(1.0)}}
    )
    wanted = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"]) / 2
    torch.testing.assert_close(found[LINEAR], wanted)
    one, two = (
        torch.einsum("pqxy,po,qi->oixy", conv[f"hada_t{i}"], conv[f"hada_w{i}_a"], conv[f"hada_w{i}_b"]) for i in (1, 2)
    )
    torch.testing.assert_close(found[CONV], one * two / 3)
    config = read_config(tmp_path / "peft")
    assert config["peft_type"] == "LOHA" and config["use_effective_conv2d"] is True


def test_lokr_of_whole_and_of_low_rank_factors(tmp_path: Path) -> None:
    whole = {"lokr_w1": random(3, 2), "lokr_w2": random(4, 4), "alpha": torch.tensor(99.0)}
    low = {
        "lokr_w1": random(3, 2),
        "lokr_w2_a": random(4, 1),
        "lokr_w2_b": random(1, 4 * 9),
        "alpha": torch.tensor(3.0),
    }
    found = converted(tmp_path, {LINEAR: whole, CONV: low})
    torch.testing.assert_close(found[LINEAR], torch.kron(whole["lokr_w1"], whole["lokr_w2"]))  # alpha does not count
    w2 = (low["lokr_w2_a"] @ low["lokr_w2_b"]).reshape(4, 4, 3, 3)
    wanted = 3.0 * torch.einsum("ab,cdxy->acbdxy", low["lokr_w1"], w2).reshape(12, 8, 3, 3)
    torch.testing.assert_close(found[CONV], wanted)


def test_locon_with_a_middle_factor(tmp_path: Path) -> None:
    own = {"lora_down.weight": random(2, 8, 1, 1), "lora_mid.weight": random(2, 2, 3, 3)}
    own |= {"lora_up.weight": random(12, 2, 1, 1), "alpha": torch.tensor(1.0)}
    plain = {"lora_down.weight": random(4, 8), "lora_up.weight": random(12, 4)}
    found = converted(tmp_path, {CONV: own, LINEAR: plain})
    up, down = own["lora_up.weight"].flatten(1), own["lora_down.weight"].flatten(1)
    wanted = torch.einsum("op,pqxy,qi->oixy", up, own["lora_mid.weight"], down) / 2
    torch.testing.assert_close(found[CONV], wanted)
    torch.testing.assert_close(found[LINEAR], plain["lora_up.weight"] @ plain["lora_down.weight"])
    assert factors(tmp_path / "peft")[CONV][2] == 0.5


def test_loha_of_a_fused_matrix_is_split_and_lokr_is_refused(tmp_path: Path) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    own = {"hada_w1_a": random(12, 2), "hada_w1_b": random(2, 8), "hada_w2_a": random(12, 2), "hada_w2_b": random(2, 8)}
    save_file({f"{name}.{end}": tensor for end, tensor in own.items()}, tmp_path / "l.safetensors")
    report = convert(tmp_path / "l.safetensors", tmp_path / "peft", family="flux")
    assert report.modules == {"": 3} and report.source == "lycoris"
    save_file({f"{name}.lokr_w1": random(3, 2), f"{name}.lokr_w2": random(4, 4)}, tmp_path / "k.safetensors")
    with pytest.raises(NotImplementedError, match="img_attn_qkv"):
        convert(tmp_path / "k.safetensors", tmp_path / "kron", family="flux")
    assert not (tmp_path / "kron").exists()


@pytest.mark.parametrize(
    ("tensors", "error", "field"),
    [
        ({"hada_w1_a": (12, 2)}, ValueError, "hada_w1_b"),
        ({"lokr_w1": (3, 2)}, ValueError, "lokr_w2"),
        ({"lokr_w1": (4, 2), "lokr_w2": (3, 4)}, NotImplementedError, "decompose_factor"),
        ({"lokr_w1": (3, 2), "lokr_w2": (4, 4), "dora_scale": (12, 1)}, NotImplementedError, "dora_scale"),
        ({"lokr_w1": (3, 2), "lokr_w2": (4, 4), "diff": (12, 8)}, NotImplementedError, "diff"),
        ({"lora_mid.weight": (2, 2, 3, 3), "lora_up.weight": (12, 2)}, ValueError, "lora_down"),
        ({"lokr_w1": (3, 2), "lokr_w2": (4, 4), "alpha": (2,)}, ValueError, "alpha"),
    ],
)
def test_what_does_not_fit_is_refused(
    tensors: dict[str, tuple[int, ...]], error: type[Exception], field: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=field):
        converted(tmp_path, {LINEAR: {end: random(*shape) for end, shape in tensors.items()}})
    assert not (tmp_path / "peft").exists()


def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    rng = Random(0)
    flat = FLAT[LINEAR]
    shapes = [
        {"lokr_w1": (3, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4), "alpha": ()},
        {"hada_w1_a": (12, 2), "hada_w1_b": (2, 8), "hada_w2_a": (12, 2), "hada_w2_b": (2, 8), "alpha": ()},
        {"hada_w1_a": (2, 12), "hada_w1_b": (2, 8), "hada_w2_a": (2, 12), "hada_w2_b": (2, 8), "hada_t1": (2, 2, 3, 3)},
        {"lora_down.weight": (2, 8, 1, 1), "lora_up.weight": (12, 2, 1, 1), "lora_mid.weight": (2, 2, 3, 3)},
    ]
    for turn in range(120):
        tensors = {f"{flat}.{end}": random(*shape) for end, shape in rng.choice(shapes).items()}
        key = rng.choice(list(tensors))
        damage = rng.randrange(4)
        if damage == 0:
            del tensors[key]
        elif damage == 1:
            tensors[key] = torch.zeros([rng.choice([0, 1, 2, 3, 7]) for _ in range(rng.randrange(6))])
        elif damage == 2:
            tensors[key] = tensors[key].to(rng.choice([torch.bool, torch.complex64, torch.int8]))
        else:
            tensors[key] = torch.full_like(tensors[key], float("nan"))
        save_file(tensors, tmp_path / "l.safetensors")
        out = tmp_path / str(turn)
        try:
            convert(tmp_path / "l.safetensors", out, family="sd")
        except (ValueError, NotImplementedError) as error:
            assert str(error) and not out.exists()
        assert not list(tmp_path.glob(".unfinished*"))


@pytest.mark.parametrize("kind", ["LohaModule", "LokrModule", "LoConModule"])
@pytest.mark.parametrize("options", [{}, {"use_tucker": True}])
def test_layers_of_lycoris_compute_the_same(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    lycoris = pytest.importorskip("lycoris.modules", reason="lycoris-lora is not installed")
    model, tensors, layers = Model(), {}, {}
    for name, flat in FLAT.items():
        layer = getattr(lycoris, kind)(flat, model.get_submodule(name), 1.0, lora_dim=1, alpha=0.5, **options).eval()
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        tensors |= {f"{flat}.{end}": value.clone() for end, value in layer.state_dict().items()}
        layers[name] = layer
    save_file(tensors, tmp_path / "l.safetensors")
    convert(tmp_path / "l.safetensors", tmp_path / "peft", family="sd")
    ours = peft.PeftModel.from_pretrained(Model(), str(tmp_path / "peft"))
    for name, layer in layers.items():
        x = random(2, 8, *[5, 5][: 2 * (name == CONV)])
        update = ours.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        wanted = layer(x) - model.get_submodule(name)(x)
        found = nn.functional.conv2d(x, update) if name == CONV else nn.functional.linear(x, update)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_other_formats_hold_no_loha(tmp_path: Path) -> None:
    own = {"hada_w1_a": random(12, 2), "hada_w1_b": random(2, 8), "hada_w2_a": random(12, 2), "hada_w2_b": random(2, 8)}
    save_file({f"{FLAT[LINEAR]}.{end}": tensor for end, tensor in own.items()}, tmp_path / "l.safetensors")
    with pytest.raises(NotImplementedError, match="LOHA"):
        convert(tmp_path / "l.safetensors", tmp_path / "c.safetensors", to="comfy", family="sd")
