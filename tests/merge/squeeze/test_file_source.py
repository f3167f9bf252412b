"""Files before and after `squeeze_adapter`: other tensors, formats, sizes, and no output after a failure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_zoo import SqueezeLoraConfig
from peft_zoo.kernels.low_rank.factored import FactoredSvd
from peft_zoo.merge.squeeze.api import squeeze_adapter
from tests.merge.conftest import Original
from tests.merge.samples import (
    CONFIG,
    WEIGHTS,
    R,
    adapted,
    best,
    best_error,
    config,
    content,
    factors,
    kohya,
    layers,
    loaded,
    optimum,
    outputs,
    ranks,
    saved,
    single,
    updates,
)

CLOSE: dict[str, Any] = {"atol": 1e-6, "rtol": 0}  # as in test_api.py


def edit(folder: Path, **changes: Any) -> None:
    (folder / CONFIG).write_text(json.dumps({**config(folder), **changes}))


def copied(folder: Path, target: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(folder, target))


def others(path: Path) -> dict[str, Tensor]:
    """All tensors but factors and alphas."""
    parts = ("lora_A", "lora_B.weight", "lora_embedding", "lora_down", "lora_up", ".lora.", ".alpha")
    return {key: tensor for key, tensor in content(path)[0].items() if not any(part in key for part in parts)}


def test_everything_else_is_copied(tmp_path: Path) -> None:
    more = {"modules_to_save": ["head"], "trainable_token_indices": {"words": [1, 2]}, "bias": "all"}
    model = adapted(target_modules=["linear", "conv2"], **more)
    saved(tmp_path / "in", model)
    (tmp_path / "in" / "README.md").write_text("A card.")
    squeeze_adapter(tmp_path / "in", tmp_path / "out", rank=3)

    assert (tmp_path / "out" / "README.md").read_text() == "A card."
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", CONFIG, WEIGHTS}
    before, after = others(tmp_path / "in"), others(tmp_path / "out")
    assert before.keys() == after.keys() and {"head", "words"} <= {key.split(".")[2] for key in before}
    assert all(torch.equal(before[key], after[key]) for key in before)

    for name, layer in layers(model).items():  # the model with nothing but the factors changed
        wanted = best(layer.get_delta_weight("default"), 3).flatten(1).detach()
        B, A = (factor["default"].weight for factor in (layer.lora_B, layer.lora_A))
        A.data.copy_((torch.linalg.pinv(B.flatten(1)) @ wanted / layer.scaling["default"]).reshape(A.shape))
        assert name in ("linear", "conv2")
    torch.testing.assert_close(outputs(loaded(tmp_path / "out")), outputs(model), **CLOSE)


def test_magnitudes_are_copied(original: Original, tmp_path: Path) -> None:
    squeeze_adapter(original("dora"), tmp_path / "out", rank=3)
    before, after = others(original("dora")), others(tmp_path / "out")
    assert len(before) == 5 and all("magnitude" in key for key in before)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_an_adapter_of_several_with_another_name(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["linear"]))
    nn.init.normal_(layers(model, "other")["linear"].lora_B["other"].weight)
    saved(tmp_path / "in", model)
    first = (tmp_path / "in" / WEIGHTS).read_bytes()
    report = squeeze_adapter(tmp_path / "in" / "other", tmp_path / "out", rank=3)
    assert ranks(report) == {"linear": 3}
    wanted = outputs(optimum(model, {"linear": 3}, "other"))
    torch.testing.assert_close(outputs(loaded(tmp_path / "out")), wanted, **CLOSE)
    assert (tmp_path / "in" / WEIGHTS).read_bytes() == first


def test_what_trained_with_a_schedule_becomes_a_plain_lora(original: Original, tmp_path: Path) -> None:
    saved(tmp_path / "in", config_cls=SqueezeLoraConfig, target_rank=4, schedule="geometric", num_stages=2)
    assert config(tmp_path / "in")["peft_type"] == "ZOO_SQUEEZE_LORA"
    squeeze_adapter(tmp_path / "in", tmp_path / "out", rank=3)
    assert config(tmp_path / "out")["peft_type"] == "LORA"
    assert config(tmp_path / "out").keys() <= config(original("plain")).keys()
    assert type(loaded(tmp_path / "out").peft_config["default"]) is LoraConfig


def test_how_the_factors_began_is_forgotten(original: Original, tmp_path: Path) -> None:
    edit(copied(original("plain"), tmp_path / "in"), init_lora_weights="eva", eva_config={"rho": 2.0})
    squeeze_adapter(tmp_path / "in", tmp_path / "out", rank=3)
    assert loaded(tmp_path / "out").peft_config["default"].init_lora_weights is True  # and peft has nothing to warn of


def test_dropped_modules_are_not_adapted_any_more(tmp_path: Path) -> None:
    model = adapted()
    for name, size in {"conv1": 1e-4, "conv3": 1e-4, "linear": 5}.items():
        layers(model)[name].lora_B["default"].weight.data *= size
    saved(tmp_path / "in", model)
    with pytest.warns(UserWarning, match=r"0\.0%"):
        report = squeeze_adapter(tmp_path / "in", tmp_path / "out", budget=103, min_rank=0)
    assert {name for name, rank in ranks(report).items() if not rank} == {"conv1", "conv3"}
    after = loaded(tmp_path / "out")
    assert layers(after).keys() == {"words", "linear", "conv2"}
    torch.testing.assert_close(outputs(after), outputs(optimum(model, ranks(report))), **CLOSE)


class Twins(nn.Module):
    """Two layers, the name of one being the end of the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.block = nn.Linear(8, 8), nn.ModuleDict({"q": nn.Linear(8, 8)})


@pytest.mark.parametrize("layers_to_transform", [None, [0]])  # goes with a list of names only
def test_a_dropped_module_is_not_taken_for_one_that_stays(layers_to_transform: Any, tmp_path: Path) -> None:
    model = get_peft_model(Twins(), LoraConfig(r=4, target_modules=["q"]))
    for name, size in (("q", 1.0), ("block.q", 1e-4)):
        nn.init.normal_(layers(model)[name].lora_B["default"].weight, std=size)
    saved(tmp_path / "in", model)
    edit(tmp_path / "in", layers_to_transform=layers_to_transform)
    with pytest.warns(UserWarning, match=r"block.q keeps only"):
        squeeze_adapter(tmp_path / "in", tmp_path / "out", budget=32, min_rank=0)
    assert layers(PeftModel.from_pretrained(Twins(), str(tmp_path / "out"))).keys() == {"q"}


@pytest.mark.parametrize("kind", ["dora", "bias"])
def test_modules_with_more_than_factors_keep_a_rank_of_at_least_one(
    kind: str, original: Original, tmp_path: Path
) -> None:
    modules = squeeze_adapter(original(kind), tmp_path / "some", rank=3).modules
    least = sum(module.params_before // R for module in modules)
    with pytest.warns(UserWarning, match="conv1 keeps only") if kind == "dora" else nullcontext():
        report = squeeze_adapter(original(kind), tmp_path / "least", budget=least, min_rank=0)
    assert set(ranks(report).values()) == {1}
    with pytest.raises(ValueError, match=rf"budget {least - 1} .* {least} parameters"):
        squeeze_adapter(original(kind), tmp_path / "none", budget=least - 1, min_rank=0)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)


def test_attention_needs_one_rank(tmp_path: Path) -> None:
    model = get_peft_model(Attention(), LoraConfig(r=4, target_modules=["attn"], init_lora_weights=False))
    layers(model)["attn"].lora_B["default"].weight.data[:, 1:] *= 1e-3
    saved(tmp_path / "in", model)
    with pytest.raises(NotImplementedError, match=r"attn\.base_layer\.out_proj"):
        squeeze_adapter(tmp_path / "in", tmp_path / "none", energy=0.9)
    squeeze_adapter(tmp_path / "in", tmp_path / "out", rank=3)
    after = PeftModel.from_pretrained(Attention(), str(tmp_path / "out"))
    for name, layer in layers(after).items():
        wanted = best(layers(model)[name].get_delta_weight("default"), 3)
        torch.testing.assert_close(layer.get_delta_weight("default"), wanted, **CLOSE)


# Formats of single files.


def names(tensors: dict[str, Tensor]) -> list[str]:
    return [key.removesuffix(".lora_down.weight") for key in tensors if key.endswith("lora_down.weight")]


@pytest.mark.parametrize(
    ("alpha", "how"),
    [
        (None, {"rank": 2}),
        (2.0, {"rank": 2}),
        (3, {"rank": 2}),
        ("some", {"rank": 2}),
        ("some", {"energy": 0.99}),
        (3, {"energy": 0.99}),
    ],
)
def test_sd_scripts(alpha: Any, how: dict[str, Any], tmp_path: Path) -> None:
    tensors, dtype = kohya(), torch.int64 if isinstance(alpha, int) else torch.bfloat16
    alphas = {"lora_unet_to_q": 2.0} if alpha == "some" else dict.fromkeys(names(tensors), alpha) if alpha else {}
    tensors |= {f"{name}.alpha": torch.tensor(value, dtype=dtype) for name, value in alphas.items()}
    tensors["emb_params"] = torch.randn(3, 4).half()
    texts = {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_tag": "é", "sshs_model_hash": "0123"}
    single(tmp_path / "in.safetensors", tensors, texts)
    report = squeeze_adapter(tmp_path / "in.safetensors", tmp_path / "out.safetensors", **how)
    new, new_texts = content(tmp_path / "out.safetensors")

    old = updates(tensors, lambda name: alphas.get(name, 4) / 4)
    found = updates(new, lambda name: float(new.get(f"{name}.alpha", ranks(report)[name])) / ranks(report)[name])
    for module in report.modules:
        error = ((found[module.name] - old[module.name]).norm() / old[module.name].norm()).item()
        assert error == pytest.approx(best_error(old[module.name], module.new_rank), abs=1e-6)  # written as float32
        assert module.rel_error == pytest.approx(error, abs=1e-6)
    written = {key for key in new if key.endswith(".alpha")}
    assert new.keys() - written == tensors.keys() - written and (not written) == (alpha is None)
    assert len({float(new[key]) for key in written}) <= 1  # as diffusers reads alphas
    assert torch.equal(new["emb_params"], tensors["emb_params"])
    assert new["lora_unet_conv.lora_down.weight"].shape[1:] == (4, 3, 3)
    spoken = {None: "2", 2.0: "1", 3: "1.5", "some": "2"}[alpha]
    assert new_texts["ss_network_dim"] == ("2" if "rank" in how else "Dynamic")
    if "rank" in how:
        assert new_texts["ss_network_alpha"] == spoken
    assert new_texts["ss_tag"] == "é" and "sshs_model_hash" not in new_texts


def test_alpha_that_the_dtype_of_the_file_cannot_hold(tmp_path: Path) -> None:
    tensors = kohya()
    tensors |= {f"{name}.alpha": torch.tensor(1, dtype=torch.int32) for name in names(tensors)}
    single(tmp_path / "in.safetensors", tensors)
    squeeze_adapter(tmp_path / "in.safetensors", tmp_path / "out.safetensors", rank=2)
    alpha = content(tmp_path / "out.safetensors")[0]["lora_unet_to_q.alpha"]
    assert (alpha.dtype, alpha.item()) == (torch.float32, 0.5)


def test_old_diffusers(tmp_path: Path) -> None:
    tensors = factors("unet.mid.to_q", "lora.down.weight", "lora.up.weight", (10, 8), 4)
    single(tmp_path / "in.safetensors", tensors)
    squeeze_adapter(tmp_path / "in.safetensors", tmp_path / "out.safetensors", rank=2)
    new, texts = content(tmp_path / "out.safetensors")
    wanted = best(updates(tensors, lambda name: 1.0)["unet.mid.to_q"], 2)
    torch.testing.assert_close(updates(new, lambda name: 1.0)["unet.mid.to_q"], wanted, **CLOSE)
    assert texts == {} and new.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("prefix", "how"), [("unet.", {"rank": 2}), ("unet.", {"budget": 44, "min_rank": 0}), ("", {"rank": 2})]
)
def test_diffusers_with_configurations_in_the_header(prefix: str, how: dict[str, Any], tmp_path: Path) -> None:
    tensors = {}
    for seed, name in enumerate(("mid.to_q", "mid.to_v", "up.to_q")):
        pair = factors(f"{prefix}{name}", "lora_A.weight", "lora_B.weight", (10, 8), 4, seed=seed)
        tensors |= {key: tensor * (1e-4 if name == "mid.to_v" else 1) for key, tensor in pair.items()}
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_v"], "use_rslora": True}
    known = {f"{prefix}{field}": value for field, value in lora.items()}
    known |= {"text_encoder.r": 8, "text_encoder.lora_alpha": 8} if prefix else {}
    single(tmp_path / "in.safetensors", tensors, {"lora_adapter_metadata": json.dumps(known), "format": "pt"})
    warns = pytest.warns(UserWarning, match=r"to_v keeps only 0.0%") if "budget" in how else nullcontext()
    with warns:
        report = squeeze_adapter(tmp_path / "in.safetensors", tmp_path / "out.safetensors", **how)
    new, texts = content(tmp_path / "out.safetensors")

    spoken = {
        name.removeprefix(prefix): value
        for name, value in json.loads(texts["lora_adapter_metadata"]).items()
        if name.startswith(prefix) and not name.startswith("text_encoder.")
    }
    stock = LoraConfig(**spoken)  # as diffusers reads it
    scale = stock.lora_alpha / stock.r**0.5 if stock.use_rslora else stock.lora_alpha / stock.r
    assert not stock.use_rslora and not stock.rank_pattern and not stock.alpha_pattern
    left = {name: rank for name, rank in ranks(report).items() if rank}
    assert set(left.values()) == {stock.r}
    assert stock.target_modules == {name.removeprefix(prefix) for name in left}
    for name, update in updates(new, lambda name: scale).items():
        wanted = best(updates(tensors, lambda name: 8 / 4**0.5)[name], left[name])
        torch.testing.assert_close(update, wanted, atol=1e-5, rtol=0)  # of size 10
    assert texts["format"] == "pt" and ("text_encoder.r" in texts["lora_adapter_metadata"]) == bool(prefix)


@pytest.mark.parametrize(("fmt", "share"), [("peft", 0.4), ("kohya", 0.7), ("diffusers_peft", 0.4)])
def test_size_is_that_of_the_file(fmt: str, share: float, tmp_path: Path) -> None:
    down, up = ("lora_down", "lora_up") if fmt == "kohya" else ("lora_A", "lora_B")
    prefix = {"peft": "base_model.model.", "kohya": "lora_", "diffusers_peft": "unet."}[fmt]
    tensors: dict[str, Tensor] = {}
    for place in range(32):  # ranks will differ, and where a header speaks of them it grows
        name = f"{prefix}down_blocks.{place}.attentions.1.transformer_blocks.0.attn1.to_out.0"
        name = name.replace(".", "_") if fmt == "kohya" else name
        pair = factors(name, f"{down}.weight", f"{up}.weight", (160, 96), 8, seed=place, dtype=torch.float16)
        tensors |= {key: tensor * 3.0 ** (place % 4) for key, tensor in pair.items()}
        tensors |= {f"{name}.alpha": torch.tensor(3, dtype=torch.float16)} if fmt == "kohya" else {}
    known = {"unet.r": 8, "unet.lora_alpha": 8, "unet.target_modules": ["to_q"]}
    texts = {"lora_adapter_metadata": json.dumps(known)} if fmt == "diffusers_peft" else None
    path, out, weights = tmp_path / "in.safetensors", tmp_path / "out.safetensors", tmp_path / "out.safetensors"
    if fmt == "peft":
        path, out, weights = tmp_path / "in", tmp_path / "out", tmp_path / "out" / WEIGHTS
        path.mkdir()
        (path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8}))
    budget = int(share * single(path / WEIGHTS if path.is_dir() else path, tensors, texts).stat().st_size)
    report = squeeze_adapter(path, out, budget=f"{budget / 1000:.3f} KB")
    assert len(set(ranks(report).values())) > 2
    assert 0.85 * budget < weights.stat().st_size <= budget


# Failures.


def spoil(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        tensors[key] = change(tensors[key]).contiguous()
        save_file(tensors, folder / WEIGHTS)

    return apply


LINEAR = "base_model.model.linear.lora_B.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (spoil(LINEAR, lambda B: B / 0), ValueError, rf"non-finite values in {LINEAR}"),
        (spoil(LINEAR, lambda B: B[:, :4]), ValueError, r"linear: lora_A \(r=6\)"),
        (lambda folder: edit(folder, r=5), ValueError, "rank 5, .* 6"),
        (lambda folder: edit(folder, peft_type="ADALORA"), NotImplementedError, "ADALORA"),
        (lambda folder: edit(folder, peft_type="XLORA"), NotImplementedError, "XLORA"),
        (lambda folder: edit(folder, layer_replication=[[0, 1]]), NotImplementedError, "layer_replication"),
        (lambda folder: edit(folder, target_parameters=["w"]), NotImplementedError, "target_parameters"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), ValueError, "safetensors"),
        (lambda folder: (folder.parent / "out").write_text("mine"), ValueError, "out_dir="),
    ],
)
def test_damaged_input(
    damage: Callable[[Path], Any], error: type[Exception], message: str, original: Original, tmp_path: Path
) -> None:
    damage(copied(original("plain"), tmp_path / "in"))
    before = sorted((path, path.stat().st_size) for path in tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        squeeze_adapter(tmp_path / "in", tmp_path / "out", rank=3)
    assert sorted((path, path.stat().st_size) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["folder", "in.safetensors"])
def test_target_of_a_single_file(name: str, tmp_path: Path) -> None:
    single(tmp_path / "in.safetensors", kohya())
    with pytest.raises(ValueError, match=f"out_dir=.*{name}"):
        squeeze_adapter(tmp_path / "in.safetensors", tmp_path / name, rank=2)
    assert content(tmp_path / "in.safetensors")[0].keys() == kohya().keys() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("out", ["folder", "file.safetensors"])
def test_failing_halfway_leaves_nothing(
    out: str, original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single(tmp_path / "in.safetensors", kohya())
    source = original("plain") if out == "folder" else tmp_path / "in.safetensors"
    truncate, written = FactoredSvd.truncate, []

    def fails(self: FactoredSvd, *args: Any, **options: Any) -> Any:
        written.append([path.name for path in tmp_path.glob(".unfinished-*")])
        if len(written) == 3:
            raise MemoryError("the third module is too much")
        return truncate(self, *args, **options)

    monkeypatch.setattr(FactoredSvd, "truncate", fails)
    with pytest.raises(MemoryError):
        squeeze_adapter(source, tmp_path / out, rank=2)
    assert written[-1], "it was writing"
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_an_empty_folder_is_taken(original: Original, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    squeeze_adapter(original("plain"), tmp_path / "out", rank=3)
    assert content(tmp_path / "out")[0]["base_model.model.linear.lora_A.weight"].shape == (3, 12)
