"""Adapters of every type on a model without memory: their layers merge to the bits of peft, bad files are refused."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from peft_zoo.merge.base import exportable as exportable_module
from peft_zoo.merge.base import skeleton
from peft_zoo.merge.base.child import run_in_child
from peft_zoo.merge.base.exportable import DERIVED, exportable
from peft_zoo.merge.base.hollow import is_hollow, make_hollow, merged_values
from peft_zoo.merge.checkpoint.adapter import OpenAdapter, add_to_model, read_adapter
from peft_zoo.merge.checkpoint.options import WeightedAdapter
from tests.merge import models
from tests.merge.export.adapters import CONFIGS, base

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ELSEWHERE = {"ADAMSS", "TRAINABLE_TOKENS"}
"""Types without a row here: the first needs scikit-learn, files of the second have whole rows."""

Make = Callable[[], nn.Module]


def train(model: nn.Module) -> None:
    """Makes the trainable parameters random, as if they had been trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)


def saved(folder: Path, make: Make, config: Any) -> Path:
    """Folder of an adapter of a model whose trained parameters are random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(make(), config)
        train(model)
        model.save_pretrained(folder)
    return folder


def loaded(model: nn.Module, folder: Path) -> OpenAdapter:
    """A saved adapter on a model without memory."""
    adapter = read_adapter(WeightedAdapter("default", str(folder)))
    with adapter.file:
        add_to_model(adapter, model)
    return adapter


def on_hollow(folder: Path, make: Make, arithmetic: str) -> OpenAdapter:
    """The adapter on a model without memory, of float32 for exact arithmetic."""
    hollow = make()
    make_hollow(hollow, (lambda name, tensor: torch.float32) if arithmetic == "exact" else None)
    return loaded(hollow, folder)


def engine(folder: Path, make: Make, arithmetic: str) -> dict[str, Tensor]:
    """All parameters of a model after merging an adapter layer by layer, in the dtype of the model."""
    own = make()
    adapter = on_hollow(folder, make, arithmetic)
    old = {name: parameter.detach() for name, parameter in own.named_parameters(remove_duplicate=False)}
    found = dict(old)
    file = load_file(folder / WEIGHTS)
    found.update({name: file[key].to(old[name].dtype) for name, key in adapter.whole.items()})
    for target, layer in adapter.layers.items():
        module = target.rpartition(".")[0]
        parts = [name for name, _ in own.get_submodule(module).named_parameters(recurse=False)]
        wide = torch.float32 if arithmetic == "exact" else None
        values = {part: found[f"{module}.{part}"].to(wide, copy=True) for part in parts}
        new = merged_values(layer, values)
        assert not layer.merged_adapters
        found.update({f"{module}.{part}": new[part].to(old[f"{module}.{part}"].dtype) for part in parts})
    bases: list[nn.Module] = [layer.get_base_layer() for layer in adapter.layers.values()]
    assert all(is_hollow(parameter) for module in bases for parameter in module.parameters(recurse=False))
    return found


def in_memory(folder: Path, make: Make) -> dict[str, Tensor]:
    """All parameters of a model after merging an adapter with peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged: Any = PeftModel.from_pretrained(make(), str(folder)).merge_and_unload()
    return {name: parameter.detach() for name, parameter in merged.named_parameters(remove_duplicate=False)}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, int]:
    """Number of elements that differ, by name of the parameter."""
    assert one.keys() == other.keys()
    counts = {name: int((one[name] != other[name]).sum()) for name in one}
    return {name: count for name, count in counts.items() if count}


QUICK = {
    "LORA",
    "MISS",
    "IA3",
    "OFT",
    "VBLORA",
    "GLORA",
    "ROAD",
    "OSF",
    "PSOFT",
    "SUPERTUNING",
    "ZOO_SNELL",
    "ZOO_LQ_LORA",
}
ROWS = [
    pytest.param(kind, dtype, marks=[] if kind in QUICK and dtype == torch.bfloat16 else pytest.mark.full)
    for kind in CONFIGS
    for dtype in (torch.bfloat16, torch.float32, torch.float16)
]


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.parametrize(("kind", "dtype"), ROWS)
def test_every_type(kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A type whose layers are made from the base weights has other ones here, and is in the table."""
    if kind == "FROD":
        pytest.importorskip("scipy")
    monkeypatch.setattr(exportable_module, "DERIVED", ())

    def make() -> nn.Module:
        return base(bias=kind in ("IA3", "ROAD")).to(dtype)

    folder = saved(tmp_path, make, CONFIGS[kind]())
    old = {name: parameter.detach() for name, parameter in make().named_parameters()}
    wanted = in_memory(folder, make)
    assert differing(old, wanted).keys() >= {"a.weight", "b.weight"}
    assert bool(differing(engine(folder, make, "peft"), wanted)) is (kind in DERIVED)
    if kind in DERIVED:
        return
    wide = {name: value.to(dtype) for name, value in in_memory(folder, lambda: make().float()).items()}
    assert not differing(engine(folder, make, "exact"), wide)


def test_every_type_has_a_row() -> None:
    mergeable = {str(kind.value) for kind in PEFT_TYPE_TO_TUNER_MAPPING if exportable(kind.value) != "no"}
    assert mergeable == CONFIGS.keys() | ELSEWHERE


class Layers(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.linear, self.transposed = nn.Embedding(12, 16), nn.Linear(16, 24), Conv1D(12, 16)
        self.line, self.image, self.volume = nn.Conv1d(4, 6, 3), nn.Conv2d(4, 8, (3, 2)), nn.Conv3d(2, 6, (1, 2, 3))


def layers() -> nn.Module:
    torch.manual_seed(0)
    return Layers()


def untied_gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes: Any = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, **sizes))


KINDS: dict[str, tuple[Make, Any, int]] = {
    "every layer": (layers, {"target_modules": [name for name, _ in Layers().named_children()]}, 6),
    "dora": (layers, {"target_modules": ["words", "linear", "line", "image"], "use_dora": True}, 4),
    "lora_bias": (layers, {"target_modules": ["linear", "image"], "lora_bias": True}, 2),
    "lora_only": (layers, {"target_modules": ["linear", "image"], "bias": "lora_only"}, 2),
    "all biases": (layers, {"target_modules": ["linear"], "bias": "all", "use_rslora": True}, 1),
    "whole modules": (layers, {"target_modules": ["linear"], "modules_to_save": ["image", "words"]}, 1),
    "gpt2": (untied_gpt2, {"target_modules": ["c_attn", "wte", "lm_head"]}, 3),
    "experts": (models.mixtral, {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}, 4),
    "expressions": (models.llama, {"target_modules": r".*\.layers\.\d+\..*(q|down)_proj"}, 2),
}


@pytest.mark.parametrize("arithmetic", ["exact", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind: str, arithmetic: str, tmp_path: Path) -> None:
    make, fields, count = KINDS[kind]
    folder = saved(tmp_path, make, LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **fields))
    wanted = in_memory(folder, make)
    adapter = on_hollow(folder, make, arithmetic)
    assert len(adapter.layers) == count
    old = {name: parameter.detach() for name, parameter in make().named_parameters(remove_duplicate=False)}
    changed = differing(old, wanted)
    assert {name for name in adapter.layers if name in wanted} <= changed.keys()
    assert not differing(engine(folder, make, arithmetic), wanted)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys", "ignore:The following alpha_pattern keys")
def test_factors_of_single_experts_are_stacked_as_peft_does(tmp_path: Path) -> None:
    """transformers 4 had a module for each expert, of which peft makes one parameter while it loads."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "target_modules": ["w1", "w2", "w3", "q_proj"]}
    experts = [f"block_sparse_moe.experts.{expert}.{name}" for expert in range(4) for name in ("w1", "w2", "w3")]
    file = {}
    for layer, module in itertools.product(range(2), [*experts, "self_attn.q_proj"]):
        start = f"base_model.model.model.layers.{layer}.{module}"
        file[f"{start}.lora_A.weight"], file[f"{start}.lora_B.weight"] = torch.randn(2, 32), torch.randn(32, 2)
    save_file(file, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    wanted = in_memory(tmp_path, models.mixtral)
    old = {name: parameter.detach() for name, parameter in models.mixtral().named_parameters()}
    assert len(differing(old, wanted)) == 6
    assert not differing(engine(tmp_path, models.mixtral, "exact"), wanted)


class Attention(nn.Module):
    """An attention of torch, whose layers are not called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2)


def test_attention_of_torch_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, Attention, LoraConfig(r=2, target_modules=["attn"], init_lora_weights=False))
    with pytest.raises(NotImplementedError, match=r"attn: .*MultiheadAttention"):
        on_hollow(tmp_path, Attention, "exact")


def test_a_large_adapter_is_loaded_in_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, base, CONFIGS["LORA"]())
    monkeypatch.setattr(skeleton, "PORTION", 1000)
    assert not differing(engine(folder, base, "exact"), in_memory(folder, base))
    change(folder, lambda tensors: tensors.pop(floating(tensors)))
    with pytest.raises(ValueError, match="lacks"):
        on_hollow(folder, base, "exact")


@pytest.mark.full
def test_memory_and_time_for_eight_billion_parameters(tmp_path: Path) -> None:
    """A model of Llama's shape needs the memory of the adapter and 60 MB, and less than 10 s."""
    sizes = {"q_proj": (4096, 4096), "k_proj": (4096, 1024), "v_proj": (4096, 1024), "o_proj": (4096, 4096)}
    sizes |= {"gate_proj": (4096, 14336), "up_proj": (4096, 14336), "down_proj": (14336, 4096)}
    file = {}
    for layer, (name, (columns, rows)) in itertools.product(range(32), sizes.items()):
        path = f"base_model.model.model.layers.{layer}.{'mlp' if 14336 in (columns, rows) else 'self_attn'}.{name}"
        file[f"{path}.lora_A.weight"], file[f"{path}.lora_B.weight"] = torch.ones(16, columns), torch.ones(rows, 16)
    save_file(file, tmp_path / WEIGHTS)
    fields = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": sorted(sizes)}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    script = f"""
import time, torch
from transformers import LlamaConfig, LlamaForCausalLM
from peft_zoo.merge.base.child import MARK
from peft_zoo.merge.base.hollow import make_hollow
from peft_zoo.merge.checkpoint.adapter import add_to_model, read_adapter
from peft_zoo.merge.checkpoint.options import WeightedAdapter

def most():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

before, began = most(), time.perf_counter()
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8
    ))
make_hollow(model)
adapter = read_adapter(WeightedAdapter('default', {str(tmp_path)!r}))
add_to_model(adapter, model)
layers = adapter.layers
print(MARK + str([len(layers), most() - before, time.perf_counter() - began]))
"""
    count, memory, seconds = run_in_child(script, "", "the adapter does not load")
    assert count == 224
    assert memory < (tmp_path / WEIGHTS).stat().st_size + 60e6
    assert seconds < 10


def test_values_for_the_base_are_left_in_the_file(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["words", "linear"], modules_to_save=["image"], bias="lora_only")
    adapter = on_hollow(saved(tmp_path, layers, config), layers, "exact")
    assert adapter.whole.keys() == {"linear.bias", "image.weight", "image.bias"}
    (parameters,) = (dict(layer.named_parameters()) for name, layer in adapter.layers.items() if "linear" in name)
    real = [name for name, parameter in parameters.items() if not is_hollow(parameter)]
    assert real and all("lora_" in name for name in real)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any] | None = None, **fields: Any) -> None:
    """Changes the tensors and the fields of a saved adapter."""
    content = json.loads((folder / CONFIG).read_text())
    if edit is not None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS)
        content.pop("weights_sha256", None)
    (folder / CONFIG).write_text(json.dumps({**content, **fields}))


def floating(tensors: dict[str, Tensor]) -> str:
    """Key of a tensor of module a."""
    return next(key for key, tensor in tensors.items() if ".model.a." in key and tensor.is_floating_point())


def add(tensors: dict[str, Tensor]) -> None:
    tensors[floating(tensors).replace(".a.", ".c.")] = tensors[floating(tensors)].clone()


def enlarge(tensors: dict[str, Tensor]) -> None:
    tensors[floating(tensors)] = torch.cat([tensors[floating(tensors)]] * 2)


FAULTS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any] | None, dict[str, Any]]] = {
    "missing": (r"lacks .*model\.a\.", lambda tensors: tensors.pop(floating(tensors)), {}),
    "left over": (r"model\.c\.", add, {}),
    "larger": (r"model\.a\.", enlarge, {}),
    "infinite": ("non-finite", lambda tensors: tensors[floating(tensors)].view(-1)[:1].fill_(torch.inf), {}),
    "of a newer version": ("use_magic", None, {"use_magic": True}),
    "for copied layers": ("layer_replication", None, {"layer_replication": [[0, 1]]}),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["LORA", "MISS", "IA3", "VERA", "ZOO_SNELL"])
def test_a_file_that_does_not_fit_is_refused(kind: str, fault: str, tmp_path: Path) -> None:
    named, edit, fields = FAULTS[fault]
    change(saved(tmp_path, base, CONFIGS[kind]()), edit, **fields)
    with pytest.raises(ValueError, match=named):
        on_hollow(tmp_path, base, "exact")


@pytest.mark.parametrize(
    ("kind", "field"), [("LORA", {"rank_pattern": {"(a+)+b": 3}}), ("IA3", {"feedforward_modules": "(a+)+b"})]
)
def test_expressions_of_a_file_are_not_run(kind: str, field: dict[str, Any], tmp_path: Path) -> None:
    change(saved(tmp_path, base, CONFIGS[kind]()), **field)
    with pytest.raises(ValueError, match=f"{next(iter(field))}.*regular expression"):
        on_hollow(tmp_path, base, "exact")


def test_initializations_from_the_weights(tmp_path: Path) -> None:
    """One that was saved as a change of the base weights is refused; others are not run."""
    saved(tmp_path, base, LoraConfig(r=2, target_modules=["a"], init_lora_weights=False))
    change(tmp_path, init_lora_weights="orthogonal")
    assert not differing(engine(tmp_path, base, "exact"), in_memory(tmp_path, base))
    change(tmp_path, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        on_hollow(tmp_path, base, "exact")


def test_types_without_weights_and_made_of_the_base(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"peft_type": "OSF"}')
    with pytest.raises(NotImplementedError, match=r"peft_type='OSF'.*in_memory"):
        on_hollow(tmp_path, base, "exact")
    saved(tmp_path / "lily", base, peft.LilyConfig(r=2, target_modules=["a", "b"]))
    with pytest.raises(NotImplementedError):
        engine(tmp_path / "lily", base, "exact")
