"""Adapters saved without their base: it is decomposed again, and the bits have to be the same."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from peft_zoo import LqLoraConfig
from peft_zoo.adapters.base.loading import TRIAL
from peft_zoo.adapters.lq_lora import state as lq_lora_files
from peft_zoo.adapters.lq_lora.model import LqLoraModel
from peft_zoo.lq_lora import NFLinear, standalone
from tests.adapters.lq_lora.samples import GRID, TARGETS, adapted, base, logits, train

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAST = "model.layers.1.mlp.down_proj"


def bare(**fields: Any) -> PeftModel:
    """A trained adapter that is saved without its base."""
    model = adapted(**{"save_base": "none", **fields})
    train(model)
    return model


def without(model: PeftModel) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            return logits(model)


def state(model: nn.Module) -> tuple[dict[str, type], dict[str, Tensor]]:
    """The kinds of all modules, and copies of all tensors."""
    kinds = {name: type(module) for name, module in model.named_modules()}
    return kinds, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: tuple[dict[str, type], dict[str, Tensor]]) -> bool:
    kinds, tensors = state(model)
    same = tensors.keys() == before[1].keys() and all(torch.equal(tensors[key], before[1][key]) for key in tensors)
    return kinds == before[0] and same


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the matrices that loading decomposes; it may not do so elsewhere, nor choose anything."""
    names, real = [], lq_lora_files.quantize_layer

    def counted(config: Any, nf: Any, layer: Any, rank: int, name: str) -> Any:
        names.append(name)
        return real(config, nf, layer, rank, name)

    monkeypatch.setattr(lq_lora_files, "quantize_layer", counted)
    return names


# ---- the round trip ----


@pytest.mark.parametrize(
    ("fields", "low_cpu_mem_usage"),
    [
        ({"keep_init": "nf8", "r": 5, "use_rslora": True, "codebook": "lloyd", "svd": "randomized", "niter": 1}, False),
        ({"keep_init": True, "budget_bits": 3.0, "qconfig_grid": GRID, "rank_pattern": {"q_proj": 3}}, True),
    ],
    ids=["nf8", "budget"],
)
def test_what_is_loaded_is_what_was_saved(
    fields: dict[str, Any],
    low_cpu_mem_usage: bool,
    tmp_path: Path,
    splits: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = bare(**fields)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    assert saved and {key.rsplit(".", 2)[-2 if key.endswith("weight") else -1] for key in saved} == {
        "lora_A",
        "lora_B",
        "sha256",  # of each matrix, 32 bytes
    }
    out, start = logits(model), without(model)
    monkeypatch.setattr("peft_zoo.adapters.lq_lora.model.quantize_layer", None)
    monkeypatch.setattr("peft_zoo.adapters.lq_lora.model.plan", None)  # the choice is in the configuration
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded), out) and torch.equal(without(loaded), start)
    assert sorted(splits) == sorted(model.peft_config["default"].base_sha256)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert loaded.base_model._rebuilt == {}
    loaded.save_pretrained(tmp_path / "again")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_transposed_weights_and_a_layer_that_is_not_quantized(tmp_path: Path, splits: list[str]) -> None:
    def plain() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 16, "n_inner": 40}
        return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).eval()

    fields = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    config = LqLoraConfig(r=5, save_base="none", keep_init=True, **fields)
    model = get_peft_model(plain(), config).eval()
    train(model)
    model.save_pretrained(tmp_path)
    found = model.peft_config["default"].qconfig_map
    assert [name for name, nf in found.items() if nf is None] == ["transformer.h.0.mlp.c_proj"]
    loaded = PeftModel.from_pretrained(plain(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model)) and torch.equal(without(loaded), without(model))
    assert sorted(splits) == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]


def test_trained_further_and_saved_with_its_base(tmp_path: Path, splits: list[str]) -> None:
    bare(keep_init="nf8").save_pretrained(tmp_path / "none")
    model = PeftModel.from_pretrained(base(), tmp_path / "none", is_trainable=True)
    losses = train(model)
    assert losses[-1] < losses[0]
    model.peft_config["default"].save_base = "quantized"
    model.save_pretrained(tmp_path / "quantized")
    splits.clear()
    loaded = PeftModel.from_pretrained(base(), tmp_path / "quantized").eval()
    assert torch.equal(logits(loaded), logits(model)) and torch.equal(without(loaded), without(model))
    assert not splits


def test_the_folder_is_that_of_a_lora(tmp_path: Path) -> None:
    """The folder contains A and B only."""
    sizes = {}
    for keep_init, save_base in ((True, "quantized"), (False, "quantized"), (True, "none")):
        model = adapted(keep_init=keep_init, save_base=save_base)
        model.save_pretrained(tmp_path)
        sizes[keep_init, save_base] = (tmp_path / WEIGHTS).stat().st_size
    factors = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert sizes[True, "none"] < factors + 4096 < sizes[False, "quantized"] < sizes[True, "quantized"]


def test_older_configurations_have_the_base_in_their_folder(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields.pop("save_base") == "quantized"
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    assert LqLoraConfig.from_pretrained(tmp_path).save_base == "quantized"
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), logits(model))


# ---- what is refused ----


def test_a_weighted_decomposition_is_not_left_out_later(tmp_path: Path) -> None:
    model = adapted()
    model.peft_config["default"].weighting = "fisher"  # as after preprocess_lq_lora
    model.peft_config["default"].save_base = "none"
    with pytest.raises(ValueError, match="save_base='none'"):
        model.save_pretrained(tmp_path / "none")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("change", ["number", "dtype", "field"])
def test_other_bits_are_refused_and_nothing_is_changed(change: str, tmp_path: Path) -> None:
    model = bare()
    model.save_pretrained(tmp_path)
    onto = base(dtype=torch.bfloat16 if change == "dtype" else torch.float32)
    if change == "number":
        onto.get_submodule(LAST).weight.data[0, 0] += 0.5
    elif change == "field":
        fields = json.loads((tmp_path / CONFIG).read_text())
        (tmp_path / CONFIG).write_text(json.dumps({**fields, "num_iterations": 1}))
    before = state(onto)
    with pytest.raises(ValueError, match=r"(?s)cannot be reproduced.*save_base='quantized'") as error:
        PeftModel.from_pretrained(onto, tmp_path)
    if change == "number":
        assert str(error.value).startswith(LAST), "the others, which came first, are right"
    assert unchanged(onto, before) and not hasattr(onto, "peft_config")
    if change == "number":
        onto.get_submodule(LAST).weight.data.copy_(base().get_submodule(LAST).weight)
        assert torch.equal(logits(PeftModel.from_pretrained(onto, tmp_path).eval()), logits(model))


def test_a_model_without_one_of_the_matrices(tmp_path: Path) -> None:
    bare().save_pretrained(tmp_path)
    onto = base()
    onto.model.layers[1].mlp.down_proj = nn.Identity()
    before = state(onto)
    with pytest.raises(ValueError, match=rf"base_sha256 names '{LAST}'"):
        PeftModel.from_pretrained(onto, tmp_path)
    assert unchanged(onto, before)


def test_weights_that_come_later_know_their_base(tmp_path: Path) -> None:
    """Weights loaded later, as in a resumed training that reads no configuration, are checked against the base."""
    model = bare()
    train(model)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    same, other = bare(), bare(seed=1)
    set_peft_model_state_dict(same, weights)
    assert torch.equal(logits(same), logits(model))
    with pytest.raises(ValueError, match="trained with another quantized weight"):
        set_peft_model_state_dict(other, weights)


def test_weights_that_are_not_there_or_not_finite(tmp_path: Path) -> None:
    bare().save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = base()
    with pytest.raises(ValueError, match="has no values here"):
        PeftModel.from_pretrained(empty, tmp_path)
    broken = base()
    broken.get_submodule(LAST).weight.data[0, 0] = torch.nan
    before = {name: type(module) for name, module in broken.named_modules()}
    with pytest.raises(ValueError, match=rf"{LAST}.weight has values that are not finite"):
        PeftModel.from_pretrained(broken, tmp_path)
    assert {name: type(module) for name, module in broken.named_modules()} == before


def test_rebuilt_layers_are_dropped_if_peft_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare().save_pretrained(tmp_path)
    seen: list[tuple[LqLoraModel, int]] = []

    replace = LoraModel._create_and_replace

    def fail(self: LqLoraModel, config: Any, *args: Any, **kwargs: Any) -> None:
        if TRIAL in vars(config):
            return replace(self, config, *args, **kwargs)
        seen.append((self, len(self._rebuilt)))
        raise RuntimeError("full")

    monkeypatch.setattr(LoraModel, "_create_and_replace", fail)
    with pytest.raises(RuntimeError, match="full"):
        PeftModel.from_pretrained(base(), tmp_path)
    ((tuner, waiting),) = seen
    assert waiting == 2 * len(TARGETS) - 1 and tuner._rebuilt == {}


# ---- where the matrices are quantized already ----


def test_a_second_adapter_belongs_to_the_matrices_that_are_there(tmp_path: Path, splits: list[str]) -> None:
    first, other = bare(keep_init=True), bare(lora_alpha=3)
    first.save_pretrained(tmp_path / "first")
    other.save_pretrained(tmp_path / "other")
    bare(num_iterations=1).save_pretrained(tmp_path / "wrong")
    model = PeftModel.from_pretrained(base(), tmp_path / "first").eval()
    splits.clear()
    model.load_adapter(tmp_path / "other", "other")
    assert model.peft_config["other"].keep_init is True, "as it is there"
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(other))
    model.set_adapter("default")
    assert torch.equal(logits(model), logits(first))
    before = state(model)
    with pytest.raises(ValueError, match="base_sha256"):
        model.load_adapter(tmp_path / "wrong", "wrong")
    assert unchanged(model, before) and not splits


def test_an_adapter_created_on_quantized_layers_loads_only_onto_them(tmp_path: Path) -> None:
    """An adapter added to quantized layers loads with the first adapter, and not onto the unquantized base."""
    model = adapted(keep_init=True)
    model.save_pretrained(tmp_path / "first")
    model.add_adapter("second", LqLoraConfig(r=3, target_modules=TARGETS, save_base="none"))
    model.set_adapter("second")
    train(model)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    again = PeftModel.from_pretrained(base(), tmp_path / "first").eval()
    again.load_adapter(tmp_path / "second", "second")
    again.set_adapter("second")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="decomposed again"):
        PeftModel.from_pretrained(base(), tmp_path / "second")


def test_after_all_adapters_were_deleted(tmp_path: Path, splits: list[str]) -> None:
    """The layers stay quantized, and still belong to some adapters only."""
    first = bare()
    first.save_pretrained(tmp_path / "first")
    bare(num_iterations=1).save_pretrained(tmp_path / "wrong")
    model = copy.deepcopy(first)
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="base_sha256"):
        model.load_adapter(tmp_path / "wrong", "wrong")
    model.load_adapter(tmp_path / "first", "again")
    model.set_adapter("again")
    assert torch.equal(logits(model), logits(first)) and not splits


def test_a_model_of_the_standalone_form_is_not_decomposed(tmp_path: Path, splits: list[str]) -> None:
    standalone(adapted()).save_pretrained(tmp_path / "alone")
    config = LqLoraConfig(r=8, target_modules=TARGETS, keep_init=True, save_base="none")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "alone"), config).eval()
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    onto = AutoModelForCausalLM.from_pretrained(tmp_path / "alone")
    start = logits(onto)
    loaded = PeftModel.from_pretrained(onto, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))
    torch.testing.assert_close(without(loaded), start, rtol=1e-4, atol=1e-5)
    assert not splits
    standalone(adapted(seed=1)).save_pretrained(tmp_path / "wrong")
    wrong = AutoModelForCausalLM.from_pretrained(tmp_path / "wrong")
    before = state(wrong)
    with pytest.raises(ValueError, match="base_sha256"):
        PeftModel.from_pretrained(wrong, tmp_path / "adapter")
    assert unchanged(wrong, before)
    assert sum(isinstance(module, NFLinear) for module in wrong.modules()) == 2 * len(TARGETS)


def test_a_file_that_has_matrices_has_to_have_the_right_ones(tmp_path: Path) -> None:
    """Loads files with quantized weights into an existing adapter that was saved without them."""
    bare().save_pretrained(tmp_path / "none")
    adapted(seed=1).save_pretrained(tmp_path / "other")
    model = PeftModel.from_pretrained(base(), tmp_path / "none")
    before = state(model)
    with pytest.raises(ValueError, match="base_sha256"):
        model.load_adapter(tmp_path / "other", "default")
    assert unchanged(model, before)


def test_the_bits_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    """Sums of two threads are rounded differently: loading uses as many as the first decomposition did."""

    def wide() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(384, 384), nn.Linear(384, 2))

    before = torch.get_num_threads()
    config = LqLoraConfig(r=16, target_modules=["0"], save_base="none", num_iterations=4)
    try:
        for made, here in ((2, 1), (1, 2)):
            torch.set_num_threads(made)
            model = get_peft_model(wide(), config)
            model.save_pretrained(tmp_path)
            torch.set_num_threads(here)
            loaded = PeftModel.from_pretrained(wide(), tmp_path)
            assert torch.get_num_threads() == here
            codes = [m.get_submodule("base_model.model.0.base_layer").codes for m in (model, loaded)]
            assert torch.equal(*codes)
    finally:
        torch.set_num_threads(before)


def test_what_differs_is_named(tmp_path: Path) -> None:
    bare(num_iterations=1).save_pretrained(tmp_path)
    path = tmp_path / CONFIG
    fields = json.loads(path.read_text())
    made = fields["made_with"]
    assert made["torch"] == torch.__version__ and made["dtype"] == "float32" and made["device"].startswith("cpu")
    path.write_text(json.dumps({**fields, "made_with": {**made, "torch": "1.0", "dtype": "bfloat16"}}))
    with pytest.raises(ValueError, match=r"torch '1\.0' \(here .*dtype 'bfloat16' \(here 'float32'\)"):
        PeftModel.from_pretrained(base(seed=1), tmp_path)
    for threads in (0, 10**6, "2"):
        path.write_text(json.dumps({**fields, "made_with": {"threads": threads}}))
        with pytest.raises(ValueError, match="made_with"):
            PeftModel.from_pretrained(base(), tmp_path)
