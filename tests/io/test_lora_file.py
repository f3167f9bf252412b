"""LoRA files without a model: updates equal those of peft, and invalid files are refused before tensors are read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_zoo.io import TensorFile, TensorInfo
from peft_zoo.io.lora_file import LoraModule, open_adapter
from peft_zoo.io.lora_keys import Role
from peft_zoo.io.lora_settings import DIFFUSERS_METADATA
from tests.io.samples import PREFIX, ZOO, Zoo, pair, peft_folder

# peft 0.21 takes the bias of lora_B, which has one axis, for a shard.
pytestmark = pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape.*bias")

# B A in fp32 and peft's own order of operations differ by rounding: 7 products of numbers near 1, eps = 6e-8.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True, "target_modules": [name for name in ZOO if name != "words"]},
    "patterns": {"rank_pattern": {"conv2": 2, "^words": 5}, "alpha_pattern": {"linear": 9, "^conv1": 1}},
}


def saved(folder: Path, model: nn.Module | None = None, **config: Any) -> PeftModel:
    """A LoRA with random weights on every kind of layer, and its folder."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ZOO, "init_lora_weights": False, **config}
    model = get_peft_model(model or Zoo(), LoraConfig(**config), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


def delta(module: LoraModule, B: Tensor, A: Tensor) -> Tensor:
    """B A in the layout of the base layer's weight."""
    product = module.scale * B @ A
    if module.kind == "embedding":
        return product.t()
    return product.reshape(B.shape[0], *module.shape_A[1:])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_update_is_that_of_peft(tmp_path: Path, config: dict[str, Any]) -> None:
    model = saved(tmp_path, **config)
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    with open_adapter(tmp_path) as adapter:
        assert adapter.format == "peft" and adapter.other_keys == []
        assert adapter.modules.keys() == layers.keys()
        for name, layer in layers.items():
            module, (B, A) = adapter.modules[name], adapter.factors(name)
            assert (module.rank, module.scale) == (layer.r["default"], layer.scaling["default"])
            assert B.shape == (module.out_features, module.rank) and A.shape == (module.rank, module.in_features)
            torch.testing.assert_close(delta(module, B, A), layer.get_delta_weight("default"), **CLOSE)
            assert (Role.MAGNITUDE in module.keys) is bool(config.get("use_dora"))
            assert (Role.BIAS in module.keys) is bool(config.get("lora_bias"))


def test_a_transposed_layer_is_a_linear_one(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("c_attn", Conv1D(7, 6))
    layer = saved(tmp_path, model, target_modules=["c_attn"], fan_in_fan_out=True).base_model.model.c_attn
    with open_adapter(tmp_path) as adapter:
        B, A = adapter.factors("c_attn")
        update = adapter.modules["c_attn"].scale * B @ A
    torch.testing.assert_close(update.t(), layer.get_delta_weight("default"), **CLOSE)


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    saved(tmp_path)
    with open_adapter(str(tmp_path)) as adapter:
        kinds = {name: module.kind for name, module in adapter.modules.items()}
    assert kinds == {
        "linear": "linear",
        "words": "embedding",
        **dict.fromkeys(["conv1", "conv2", "point", "conv3"], "conv"),
    }


def test_attention_has_two_loras_with_the_settings_of_one(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("attn", nn.MultiheadAttention(4, 2))
    saved(tmp_path, model, target_modules=["attn"], rank_pattern={"attn": 3}, alpha_pattern={"^attn": 12})
    with open_adapter(tmp_path) as adapter:
        assert {name: (module.rank, module.scale) for name, module in adapter.modules.items()} == {
            "attn": (3, 4.0),
            "attn.base_layer.out_proj": (3, 4.0),
        }


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(("plain", torch.float64), ("rslora", torch.float32), ("dora", torch.float16)),
        *(("bias", torch.float32), ("bias", torch.bfloat16), ("patterns", torch.bfloat16)),
    ],
)
def test_new_factors_load_in_peft(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    config = CONFIGS[kind]
    saved(tmp_path / "in", Zoo().to(dtype), **config)
    weights = load_file(tmp_path / "in" / "adapter_model.safetensors")
    smaller = dict(weights)
    with open_adapter(tmp_path / "in") as adapter:
        for name, module in adapter.modules.items():
            B, A = adapter.factors(name)
            same = adapter.new_tensors(name, B, A, module.scale)
            assert same.keys() == set(module.keys.values())
            assert all(torch.equal(value, weights[key]) and value.dtype == dtype for key, value in same.items())
            new = adapter.new_tensors(name, B.double()[:, :2], A.double()[:2], 1.0)
            assert all(value.is_contiguous() for value in new.values())
            assert {key: TensorInfo.of(value) for key, value in new.items()} == adapter.new_infos(name, 2, 1.0)
            if Role.BIAS in module.keys:
                bias = module.keys[Role.BIAS]
                assert torch.equal(new[bias], (weights[bias].double() * module.scale).to(dtype))
            smaller |= new
        settings = {**adapter.config, "r": 2, "lora_alpha": 2, "rank_pattern": {}, "alpha_pattern": {}}
        (tmp_path / "out").mkdir()
        save_file(smaller, tmp_path / "out" / "adapter_model.safetensors")
        (tmp_path / "out" / "adapter_config.json").write_text(json.dumps({**settings, "use_rslora": False}))
        model = PeftModel.from_pretrained(Zoo().to(dtype), tmp_path / "out", autocast_adapter_dtype=False)
        loaded = get_peft_model_state_dict(model)
        assert loaded.keys() == smaller.keys()
        assert all(torch.equal(value, smaller[key]) for key, value in loaded.items())
        for name, module in adapter.modules.items():
            B, A = adapter.factors(name)
            assert torch.equal(loaded[module.key_A].flatten(1), A[:2])
            assert torch.equal(loaded[module.key_B].flatten(1), B[:, :2])


def kohya(folder: Path, **changes: Tensor) -> Path:
    """A file of sd-scripts: a linear layer with alpha, a convolution without, with DoRA."""
    tensors = {
        "lora_unet_to_q.lora_down.weight": torch.randn(4, 6),
        "lora_unet_to_q.lora_up.weight": torch.randn(5, 4),
        "lora_unet_to_q.alpha": torch.tensor(2.0),
        "lora_unet_conv.lora_down.weight": torch.randn(3, 2, 3, 3).half(),
        "lora_unet_conv.lora_up.weight": torch.randn(7, 3, 1, 1).half(),
        "lora_unet_conv.dora_scale": torch.ones(7, 1).half(),
        "bundle_emb.cat": torch.ones(2, dtype=torch.int64),
    }
    save_file({**tensors, **changes}, folder / "lora.safetensors", metadata={"ss_network_dim": "4"})
    return folder / "lora.safetensors"


def test_files_of_sd_scripts(tmp_path: Path) -> None:
    path = kohya(tmp_path)
    tensors = load_file(path)
    with open_adapter(path) as adapter:
        assert (adapter.format, adapter.config, adapter.other_keys) == ("kohya", None, ["bundle_emb.cat"])
        assert adapter.file.metadata == {"ss_network_dim": "4"}
        linear, conv = adapter.modules["lora_unet_to_q"], adapter.modules["lora_unet_conv"]
        assert (linear.kind, linear.rank, linear.scale) == ("linear", 4, 0.5)
        assert (conv.kind, conv.rank, conv.scale) == ("conv", 3, 1.0)
        assert (conv.out_features, conv.in_features, conv.dtype) == (7, 18, torch.float16)
        B, A = adapter.factors("lora_unet_conv")
        down, up = (tensors[f"lora_unet_conv.lora_{end}.weight"].float() for end in ("down", "up"))
        # What every loader computes: the small convolution after the large one.
        expected = nn.functional.conv2d(down.transpose(0, 1), up).transpose(0, 1)
        torch.testing.assert_close(delta(conv, B.float(), A.float()), expected, **CLOSE)
        assert adapter.read("bundle_emb.cat").dtype == torch.int64


@pytest.mark.parametrize("alpha", [torch.tensor(8), torch.tensor([8.0]), torch.tensor(8.0).bfloat16()])
def test_alpha_in_all_its_forms(tmp_path: Path, alpha: Tensor) -> None:
    with open_adapter(kohya(tmp_path, **{"lora_unet_to_q.alpha": alpha})) as adapter:
        assert adapter.modules["lora_unet_to_q"].scale == 2.0
    with open_adapter(kohya(tmp_path, **{"lora_unet_to_q.alpha": -0.0 * alpha})) as adapter:
        assert adapter.modules["lora_unet_to_q"].scale == 0.0  # of no use, but finite


def test_files_of_diffusers(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = {f"unet.{key}": value for key, value in pair("mid.to_q", rank=4).items()}
    save_file(tensors, path)
    with open_adapter(path) as adapter:
        assert (adapter.format, adapter.modules["unet.mid.to_q"].scale) == ("diffusers_peft", 1.0)
    config = {"unet.r": 4, "unet.lora_alpha": 6, "unet.alpha_pattern": {"^mid.to_q": 8}}
    save_file(tensors, path, metadata={DIFFUSERS_METADATA: json.dumps(config)})
    with open_adapter(path) as adapter:
        assert adapter.modules["unet.mid.to_q"].scale == 2.0
    save_file({**tensors, "unet.mid.to_q.alpha": torch.tensor(8.0)}, path)
    with open_adapter(path) as adapter:
        assert adapter.modules["unet.mid.to_q"].scale == 2.0
    save_file({"unet.q.lora.down.weight": torch.ones(2, 5), "unet.q.lora.up.weight": torch.ones(3, 2)}, path)
    with open_adapter(path) as adapter:
        assert (adapter.format, adapter.modules["unet.q"].scale) == ("diffusers", 1.0)


def test_two_alphas_for_one_module_are_refused(tmp_path: Path) -> None:
    tensors = {f"unet.{key}": value for key, value in pair(rank=4, alpha=torch.tensor(8.0)).items()}
    config = json.dumps({"unet.r": 4, "unet.lora_alpha": 6})
    save_file(tensors, tmp_path / "a.safetensors", metadata={DIFFUSERS_METADATA: config})
    with pytest.raises(ValueError, match=r"module unet\.q: .*'unet\.q\.alpha'"):
        open_adapter(tmp_path / "a.safetensors")


def test_tensors_that_are_no_lora_are_listed(tmp_path: Path) -> None:
    extra = {"score.weight": torch.ones(2, dtype=torch.int32), "q.base_layer.bias": torch.ones(3)}
    named = {"modules_to_save": ["score"], "bias": "lora_only"}
    with open_adapter(peft_folder(tmp_path, {**pair(), **extra}, **named)) as adapter:
        assert sorted(adapter.other_keys) == [PREFIX + "q.base_layer.bias", PREFIX + "score.weight"]
        assert list(adapter.modules) == ["q"]
    for key in extra:
        with pytest.raises(ValueError, match=key):
            open_adapter(peft_folder(tmp_path, {**pair(), key: extra[key]}))


def test_trained_tokens_that_the_file_lacks_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trainable_token_indices"):
        open_adapter(peft_folder(tmp_path, pair(), trainable_token_indices=[1]))


@pytest.mark.parametrize("prefix", ["diffusion_model.blocks.0.", "lycoris_blocks_0_", "lora_unet_0_", "lora_te1_0_"])
@pytest.mark.parametrize("end", ["norm.w_norm", "norm.b_norm", "x.diff_b", "y.diff", "x.scalar", "lm_head.weight"])
def test_extra_tensors_are_known_by_their_ends(tmp_path: Path, prefix: str, end: str) -> None:
    factors = {"x.lora_down.weight": torch.ones(2, 5), "x.lora_up.weight": torch.ones(3, 2)}
    save_file({prefix + key: value for key, value in {**factors, end: torch.ones(3)}.items()}, tmp_path / "a")
    if end == "lm_head.weight":
        with pytest.raises(ValueError, match="lm_head"):
            open_adapter(tmp_path / "a")
    else:
        with open_adapter(tmp_path / "a") as adapter:
            assert adapter.other_keys == [prefix + end]


def test_the_longer_name_of_a_magnitude_is_known(tmp_path: Path) -> None:
    extra = {"lora_magnitude_vector.weight": torch.ones(3)}
    with open_adapter(peft_folder(tmp_path, pair(**extra), use_dora=True)) as adapter:
        assert adapter.modules["q"].keys[Role.MAGNITUDE] == PREFIX + "q.lora_magnitude_vector.weight"
    folder = peft_folder(tmp_path, pair(**extra, lora_magnitude_vector=torch.ones(3)), use_dora=True)
    with pytest.raises(
        ValueError, match=r"'.*lora_magnitude_vector' and '.*lora_magnitude_vector\.weight' are the same"
    ):
        open_adapter(folder)


def A(*shape: int) -> dict[str, Tensor]:
    return {"lora_A.weight": torch.ones(*shape)}


def B(*shape: int) -> dict[str, Tensor]:
    return {"lora_B.weight": torch.ones(*shape)}


REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], type[Exception], str]] = {
    "rank of the config": (pair(), {"r": 8}, ValueError, "module q: .*rank 8, .* 2"),
    "rank of a pattern": (pair(), {"rank_pattern": {"q": 3}}, ValueError, "module q: .*rank 3, .* 2"),
    "huge rank": (pair(), {"r": 1_000_000}, ValueError, "r=1000000"),
    "huge rank in the file": (pair(rank=1 << 17, out=1, into=1), {}, ValueError, "r=131072"),
    "alpha": (pair(), {"lora_alpha": "16"}, ValueError, "lora_alpha='16'"),
    "expression": (pair(), {"alpha_pattern": {"(a+)+$": 1}}, ValueError, r"alpha_pattern\['\(a\+\)\+\$'\]"),
    "initialization": (pair(), {"init_lora_weights": "pissa"}, ValueError, "init_lora_weights='pissa'"),
    "kind": (pair(), {"peft_type": "ADALORA"}, NotImplementedError, "peft_type='ADALORA'"),
    "variant": (pair(), {"use_qalora": True}, NotImplementedError, "'use_qalora'=True"),
    "ranks disagree": (pair(**B(3, 3)), {}, ValueError, r"module q: lora_A \(r=2\) and lora_B \(r=3\)"),
    "no B": (
        {"q.lora_A.weight": torch.ones(2, 5)},
        {},
        ValueError,
        "module q: .*no lora_B",
    ),
    "no A": ({"q.lora_B.weight": torch.ones(3, 2)}, {}, ValueError, "module q: .*no lora_A"),
    "no factor": (
        {**pair("k"), "q.lora_magnitude_vector": torch.ones(3)},
        {},
        ValueError,
        "module q: .*no lora_A and no lora_B",
    ),
    "half an embedding": ({"q.lora_embedding_A": torch.ones(2, 9)}, {}, ValueError, "has no lora_embedding_B"),
    "embedding and linear": (
        pair(lora_embedding_A=torch.ones(2, 9), lora_embedding_B=torch.ones(3, 2)),
        {},
        ValueError,
        "module q: .*embedding",
    ),
    "integers": (
        pair(**{"lora_A.weight": torch.ones(2, 5, dtype=torch.int32)}),
        {},
        ValueError,
        "dtype torch.int32",
    ),
    "float8": (
        pair(**{"lora_B.weight": torch.ones(3, 2).to(torch.float8_e4m3fn)}),
        {},
        ValueError,
        "lora_B.weight: dtype torch.float8_e4m3fn",
    ),
    "complex": (
        pair(**{"lora_A.weight": torch.ones(2, 5, dtype=torch.complex64)}),
        {},
        ValueError,
        "dtype torch.complex64",
    ),
    "one axis": (pair(**A(2), **B(3, 2)), {}, ValueError, r"lora_A \(2,\) and lora_B \(3, 2\)"),
    "axes differ": (pair(**A(2, 5, 1, 1)), {}, ValueError, "module q: lora_A"),
    "six axes": (pair(**A(2, 5, 1, 1, 1, 1), **B(3, 2, 1, 1, 1, 1)), {}, ValueError, "module q: lora_A"),
    "nothing in it": (pair(into=0), {}, ValueError, "module q: lora_A"),
    "no rank": (pair(rank=0), {}, ValueError, "module q: lora_A"),
    "groups": (
        pair(**A(4, 6, 3), **B(6, 2, 1)),
        {"r": 4},
        NotImplementedError,
        "module q: .* a convolution with groups",
    ),
    "kernel in B": (pair(**A(2, 5, 1), **B(3, 2, 3)), {}, ValueError, r"lora_B \(3, 2, 3\) has a kernel"),
    "adapter name": (
        {**pair(), "k.lora_A.default.weight": torch.ones(2, 5)},
        {},
        ValueError,
        "unknown key '.*k.lora_A.default.weight'; the nearest known one is '.*model.k.lora_A.weight'",
    ),
    "AdaLoRA": (pair(lora_E=torch.ones(2, 1)), {}, ValueError, "unknown key '.*q.lora_E'"),
    "name": (pair("q;rm -rf"), {}, ValueError, "module 'q;rm -rf'"),
    "long name": (pair("q" * 2000), {}, ValueError, "module .q"),
    "magnitude missing": (pair(), {"use_dora": True}, ValueError, "use_dora=True"),
    "magnitude too much": (pair(lora_magnitude_vector=torch.ones(3)), {}, ValueError, "use_dora=None"),
    "magnitude shape": (
        pair(lora_magnitude_vector=torch.ones(4)),
        {"use_dora": True},
        ValueError,
        r"magnitude_vector: shape \(4,\) does not fit lora_B \(3, 2\)",
    ),
    "bias missing": (pair(), {"lora_bias": True}, ValueError, "lora_bias=True"),
    "bias shape": (
        pair(**{"lora_B.bias": torch.ones(5)}),
        {"lora_bias": True},
        ValueError,
        r"lora_B.bias: shape \(5,\) does not fit",
    ),
}


@pytest.mark.parametrize(("tensors", "config", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_together_is_refused_before_it_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    folder = peft_folder(tmp_path, tensors, **config)
    closed = []
    monkeypatch.setattr(TensorFile, "read", lambda self, name: pytest.fail("a tensor was read"))
    monkeypatch.setattr(TensorFile, "close", lambda self, close=TensorFile.close: closed.append(close(self)))
    with pytest.raises(error, match=message):
        open_adapter(folder)
    assert closed or "says" not in message


@pytest.mark.parametrize(
    ("bad", "dtype"),
    [
        *((float("nan"), dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)),
        *((float("inf"), torch.float32), (-float("inf"), torch.bfloat16), (-float("inf"), torch.float64)),
        (1e39, torch.float64),  # which the models' float32 cannot hold
    ],
)
def test_values_that_are_not_finite_are_refused(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    tensors = {key: value.to(dtype) for key, value in pair().items()}
    tensors["q.lora_B.weight"][1, 1] = bad
    with open_adapter(peft_folder(tmp_path, tensors)) as adapter:
        with pytest.raises(ValueError, match=rf"^non-finite values in {PREFIX}q\.lora_B\.weight"):
            adapter.factors("q")
        with pytest.raises(ValueError, match=r"non-finite values in .*q\.lora_A\.weight"):
            adapter.new_tensors("q", torch.ones(3, 1), torch.full((1, 5), bad, dtype=torch.float64), 1.0)


def test_values_that_become_infinite_in_the_dtype_of_the_file_are_refused(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, {key: value.half() for key, value in pair().items()})
    expected = pytest.raises(ValueError, match=r"non-finite values in .*q\.lora_B\.weight")
    with open_adapter(folder) as adapter, expected:
        adapter.new_tensors("q", torch.full((3, 1), 1e6), torch.ones(1, 5), 1.0)


def test_factors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with open_adapter(peft_folder(tmp_path, pair())) as adapter:
        for B, A in [((3, 2), (3, 5)), ((2, 3), (2, 5)), ((3, 0), (0, 5)), ((3, 2), (2, 4))]:
            with pytest.raises(ValueError, match=r"module q: B .* and A .* should be"):
                adapter.new_tensors("q", torch.ones(B), torch.ones(A), 1.0)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (torch.tensor(float("nan")), r"non-finite values in lora_unet_to_q\.alpha"),
        (torch.tensor(float("inf")), r"non-finite values in lora_unet_to_q\.alpha"),
        (torch.ones(2), r"lora_unet_to_q\.alpha: .*\(2,\)"),
        (torch.ones(0), "lora_unet_to_q.alpha: "),
        (torch.tensor(True), "lora_unet_to_q.alpha: .*torch.bool"),
    ],
)
def test_an_impossible_alpha_is_refused(tmp_path: Path, alpha: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_adapter(kohya(tmp_path, **{"lora_unet_to_q.alpha": alpha}))


def test_loras_of_three_factors_are_named(tmp_path: Path) -> None:
    path = kohya(tmp_path, **{"lora_unet_conv.lora_mid.weight": torch.ones(3, 3, 3, 3)})
    with pytest.raises(NotImplementedError, match="module lora_unet_conv: lora_mid"):
        open_adapter(path)
    with pytest.raises(
        ValueError, match=r"unknown key 'lora_unet_x\.hada_w1_a'; the nearest known one is 'lora_unet_x"
    ):
        open_adapter(kohya(tmp_path, **{"lora_unet_x.hada_w1_a": torch.ones(2, 2)}))


def lonely_weights(folder: Path) -> Path:
    return peft_folder(folder, pair()) / "adapter_model.safetensors"


def pickled_weights(folder: Path) -> Path:
    peft_folder(folder, pair())
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return folder


def foreign_weights(folder: Path) -> Path:
    shutil.move(kohya(folder), peft_folder(folder, pair()) / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lonely_weights, r"adapter_config\.json"),
        (pickled_weights, r"no adapter_model\.safetensors; .*safe_serialization=True"),
        (foreign_weights, r"kohya keys .*adapter_config\.json"),
        (lambda folder: folder, r"adapter_config\.json: not a file"),
        (lambda folder: folder / "missing", "missing: not a file"),
    ],
)
def test_files_that_belong_to_nothing_are_refused(tmp_path: Path, build: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_adapter(build(tmp_path))


def test_no_format_is_guessed(tmp_path: Path) -> None:
    keys = ["text_encoder:0:down", "text_encoder:0:up", "unet:0:down", "unet:0:up"]
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=re.escape("the keys are 'text_encoder:0:down', 'text_encoder:0:up'")):
        open_adapter(tmp_path / "a.safetensors")
