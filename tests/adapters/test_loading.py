"""Saved adapters are untrusted: what is wrong with a file is refused on each route, and the model stays as it was."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_zoo
from peft_zoo import load_adapter, save_adapter
from peft_zoo.io import open_adapter
from tests.adapters.models import unchanged

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = sorted(name for name, method in peft_zoo.methods().items() if method.trainable)
TARGETS = ["q_proj", "o_proj"]


def base() -> nn.Module:
    """A model with two layers of two linear modules."""
    torch.manual_seed(0)
    names = ("q_proj", "o_proj")
    layers = [nn.ModuleDict({name: nn.Linear(16, 16) for name in names}) for _ in range(2)]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.lm_head = nn.ModuleList(layers), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer["o_proj"](torch.tanh(layer["q_proj"](x)))
            return self.lm_head(x)

    return Model().eval()


def make(kind: str, **changes: Any) -> PeftConfig:
    """A small configuration of a type, with an update that is not zero."""
    if kind == "lora":
        return LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **changes})
    config_cls: Any = peft_zoo.methods()[kind].config_cls
    start = {"init_weights": False} if "init_weights" in config_cls.__dataclass_fields__ else {}
    if "init_lora_weights" in config_cls.__dataclass_fields__ and kind != "lq_lora":
        start = {"init_lora_weights": False}
    return config_cls(**{"r": 4, "target_modules": TARGETS, **start, **changes})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with an adapter of each type, made once."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("saved") / kind
            torch.manual_seed(1)
            get_peft_model(base(), make(kind)).save_pretrained(made[kind])
        return made[kind]

    return of


@pytest.fixture
def folder(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of such a folder, to damage."""

    def of(kind: str) -> Path:
        copied = tmp_path / kind
        copied.mkdir()
        for name in (CONFIG, WEIGHTS):
            (copied / name).write_bytes((saved(kind) / name).read_bytes())
        return copied

    return of


def edit(folder: Path, **changes: Any) -> None:
    """Changes fields of the configuration."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Changes tensors of the weights file, and the checksum with them."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    config.pop("weights_sha256", None)
    (folder / CONFIG).write_text(json.dumps(config))


def first(tensors: dict[str, Tensor]) -> str:
    """The first floating-point tensor."""
    return next(key for key in sorted(tensors) if tensors[key].is_floating_point() and tensors[key].ndim)


def renamed(tensors: dict[str, Tensor]) -> None:
    key = first(tensors)
    tensors[f"{key}_"] = tensors.pop(key)


def spoiled(tensors: dict[str, Tensor]) -> None:
    tensors[first(tensors)].view(-1)[0] = torch.nan


def longer(tensors: dict[str, Tensor]) -> None:
    key = first(tensors)
    tensors[key] = torch.cat([tensors[key], tensors[key]])


def whole_numbers(tensors: dict[str, Tensor]) -> None:
    key = first(tensors)
    tensors[key] = tensors[key].to(torch.int32)


def head_too(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.zeros(16, 16)


def without_prefix(tensors: dict[str, Tensor]) -> None:
    key = first(tensors)
    tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)


def scale(folder: Path) -> str:
    """Name of the field with the scale of the update."""
    config = json.loads((folder / CONFIG).read_text())
    return next(name for name in ("lora_alpha", "randlora_alpha", "kernel_scale") if name in config)


def dropout(folder: Path) -> str:
    """Name of the field with the dropout of the update."""
    config = json.loads((folder / CONFIG).read_text())
    return next(name for name in config if name.endswith("dropout"))


def link_away(folder: Path) -> None:
    """Replaces the weights file by a link to a file outside of the folder."""
    other = folder.parent / "elsewhere.safetensors"
    (folder / WEIGHTS).rename(other)
    (folder / WEIGHTS).symlink_to(other)


def named_pipe(folder: Path) -> None:
    """Replaces the weights file by a named pipe, which blocks whoever opens it."""
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def pickle_only(folder: Path) -> None:
    """Renames the weights file to that of a pickle."""
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def truncated(folder: Path) -> None:
    """Cuts the end of the weights file off."""
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "rank of a million": (lambda f: edit(f, r=10**6), r"\br="),
    "rank of another file": (lambda f: edit(f, r=8), r"\[4, 16\]|\br=|shape"),
    "rank pattern": (lambda f: edit(f, rank_pattern={"q_proj": 10**6}), "rank_pattern"),
    "a probability above one": (lambda f: edit(f, **{dropout(f): 1.5}), "dropout"),
    "text for a rank": (lambda f: edit(f, r="4"), r"\br="),
    "expression": (lambda f: edit(f, target_modules=r"(([a-z]+)+\.?)+!"), "target_modules.*layers.0.o_proj"),
    "expression in a pattern": (lambda f: edit(f, rank_pattern={"(a+)+!": 4}), "rank_pattern"),
    "expression for layers": (lambda f: edit(f, layers_pattern=["(a+)+!"], layers_to_transform=[0]), "layers_pattern"),
    "number for names": (lambda f: edit(f, target_modules=3), "cannot|target_modules"),
    "fewer modules": (lambda f: edit(f, target_modules=["q_proj"]), "o_proj"),
    "trained module without values": (lambda f: edit(f, modules_to_save=["lm_head"]), "lm_head"),
    "infinite": (lambda f: edit(f, **{scale(f): float("inf")}), "finite|Infinity"),
    "huge scale": (lambda f: edit(f, **{scale(f): 1e308}), "1e\\+308"),
    "renamed tensor": (lambda f: rewrite(f, renamed), "lacks .*; the file has"),
    "no prefix": (lambda f: rewrite(f, without_prefix), "lacks"),
    "not a number": (lambda f: rewrite(f, spoiled), "finite"),
    "other shape": (lambda f: rewrite(f, longer), "shape"),
    "integers": (lambda f: rewrite(f, whole_numbers), "int32"),
    "base weight": (lambda f: rewrite(f, head_too), "lm_head"),
    "pickle only": (pickle_only, "adapter_model.bin"),
    "link to elsewhere": (link_away, "link"),
    "named pipe": (named_pipe, "not a regular file"),
    "truncated": (truncated, "sha256|safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_on_each_route(
    damage: str, folder: Callable[[str], Path], recwarn: pytest.WarningsRecorder
) -> None:
    spoil, message = DAMAGES[damage]
    place = list(DAMAGES).index(damage)
    for kind in ("lora", *(KINDS[(place + i) % len(KINDS)] for i in range(2))):  # all pairs by and by
        broken = folder(kind)
        spoil(broken)
        model = base()
        with unchanged(model), pytest.raises(ValueError, match=message):
            load_adapter(str(broken), model)
        if kind == "lora":
            continue  # peft's own loader, whose configuration is not ours
        with unchanged(model), pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(model, str(broken))
        adapted = get_peft_model(model, make(kind))
        with unchanged(adapted), pytest.raises(ValueError, match=message):
            adapted.load_adapter(str(broken), "second")
        with unchanged(adapted), pytest.raises(ValueError, match=message):
            load_adapter(str(broken), adapted, "second")
        assert list(adapted.peft_config) == ["default"]


@pytest.mark.parametrize("ranks", [{"r": 32}, {"r": 64, "rank_pattern": {"0": 2}}], ids=["r", "rank_pattern"])
@pytest.mark.parametrize("kind", ["lora", *KINDS])
def test_a_rank_may_be_larger_than_the_layer(kind: str, ranks: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 16)
    model = get_peft_model(nn.Sequential(copy.deepcopy(layer)), make(kind, target_modules=["0"], **ranks)).eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 4)
    for load in (load_adapter, lambda path, model: PeftModel.from_pretrained(model, path)):
        assert torch.equal(load(str(tmp_path), nn.Sequential(copy.deepcopy(layer)))(x), model(x))


@pytest.mark.parametrize("kind", ["lora", *KINDS])
def test_a_good_adapter_computes_the_same_on_each_route(kind: str, saved: Callable[[str], Path]) -> None:
    x = torch.randn(3, 16)
    wanted = PeftModel.from_pretrained(base(), str(saved(kind)))(x)
    assert not torch.allclose(wanted, base()(x), atol=1e-3)
    model = load_adapter(str(saved(kind)), base())
    assert torch.equal(model(x), wanted) and not any(p.requires_grad for p in model.parameters())
    again = load_adapter(str(saved(kind)), model, "second", is_trainable=True)
    assert again is model and model.active_adapters == ["second"]
    assert torch.equal(model.eval()(x), wanted) and any(p.requires_grad for p in model.parameters())


def test_another_scale_is_another_valid_adapter(folder: Callable[[str], Path]) -> None:
    x, changed = torch.randn(3, 16), folder("lora")
    one = load_adapter(str(changed), base())(x)
    edit(changed, lora_alpha=80)
    assert not torch.allclose(load_adapter(str(changed), base())(x), one, atol=1e-3)


@pytest.mark.parametrize("kind", ["lora", *KINDS])
def test_a_missing_field_is_named_on_each_route(kind: str, folder: Callable[[str], Path]) -> None:
    """A default of the class could be another value than the one that the adapter was trained with."""
    incomplete = folder(kind)
    whole = json.loads((incomplete / CONFIG).read_text())
    own = [name for name in ("kernel", "basis_shape", "keep_init", "mode", "num_bits") if name in whole]
    routes: list[Callable[[nn.Module], object]] = [lambda model: load_adapter(str(incomplete), model)]
    if kind == "lora":  # what peft alone reads is not ours
        own = ["use_rslora", "alpha_pattern"]
        routes.append(lambda model: open_adapter(incomplete))
    else:
        routes.append(lambda model: PeftModel.from_pretrained(model, str(incomplete)))
        routes.append(lambda model: PeftConfig.from_pretrained(str(incomplete)))
    assert own
    for name in ("r", scale(incomplete), *own):
        (incomplete / CONFIG).write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        for route in routes:
            model = base()
            with unchanged(model), pytest.raises(ValueError, match=rf"\b{name}\b"):
                route(model)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_save_are_refused(kind: str, folder: Callable[[str], Path]) -> None:
    torn = folder(kind)
    tensors = load_file(torn / WEIGHTS)
    save_file(tensors, torn / WEIGHTS, metadata={"format": "other"})  # what a killed `save_pretrained` leaves behind
    model = base()
    for load in (load_adapter, lambda path, model: PeftModel.from_pretrained(model, path)):
        arguments = (str(torn), model)
        with unchanged(model), pytest.raises(ValueError, match="weights_sha256"):
            load(*arguments)


def test_expressions_become_names_when_an_adapter_is_saved(tmp_path: Path) -> None:
    config = make(
        "snell",
        target_modules=r".*\.(q|o)_proj",
        exclude_modules=r"layers\.0\.o.*",
        rank_pattern={r"layers\.\d\.q_proj": 2},
        sparsity_pattern={r"layers\.1\..*": 0.5},
    )
    model = get_peft_model(base(), config)
    model.save_pretrained(tmp_path)
    found = json.loads((tmp_path / CONFIG).read_text())
    names = ["layers.0.q_proj", "layers.1.q_proj", "layers.1.o_proj"]
    assert (found["target_modules"], found["exclude_modules"]) == (names, None)
    assert found["rank_pattern"] == {f"^{name}$": 2 for name in names if name.endswith("q_proj")}
    assert found["sparsity_pattern"] == {f"^{name}$": 0.5 for name in names[1:]}
    assert config.rank_pattern == {r"layers\.\d\.q_proj": 2}, "the configuration is the user's"
    x = torch.randn(3, 16)
    assert torch.equal(PeftModel.from_pretrained(base(), str(tmp_path))(x), model.eval()(x))


def test_trusted_expressions_are_run(folder: Callable[[str], Path]) -> None:
    x, trusted = torch.randn(3, 16), folder("lora")
    wanted = load_adapter(str(trusted), base())(x)
    edit(trusted, target_modules=r".*\.[qo]_proj")
    assert torch.equal(load_adapter(str(trusted), base(), trust_patterns=True)(x), wanted)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"peft_type": "EVIL"}, "peft_type"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication"),
        ({"megatron_config": {"a": 1}, "megatron_core": "nothing"}, "megatron_config"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"use_new_formula": True}, "use_new_formula"),
        ({"use_rslora": "true"}, "use_rslora"),
        ({"use_dora": 0}, "use_dora"),
        ({"lora_dropout": [0.1]}, "lora_dropout"),
        ({"lora_alpha": [8]}, "lora_alpha"),
        ({"monteclora_config": "x"}, "monteclora_config"),
        ({"loftq_config": [1]}, "loftq_config"),
    ],
)
def test_the_strict_way_refuses_fields_that_mean_something_else(
    changes: dict[str, Any], field: str, folder: Callable[[str], Path]
) -> None:
    broken = folder("lora")
    edit(broken, **changes)
    with pytest.raises(ValueError, match=field):
        load_adapter(str(broken), base())


@pytest.mark.parametrize("name", ["../elsewhere", "a b", "a/b", "x" * 65])
def test_a_name_that_is_no_name_of_a_folder_is_refused(name: str, saved: Callable[[str], Path]) -> None:
    model = base()
    with unchanged(model), pytest.raises(ValueError, match="adapter_name="):
        load_adapter(str(saved("snell")), model, name)
    with unchanged(model), pytest.raises(ValueError, match="adapter_name="):
        get_peft_model(model, make("snell"), adapter_name=name)


def test_no_state_dict_replaces_a_weight_of_the_base_model(saved: Callable[[str], Path]) -> None:
    model = PeftModel.from_pretrained(base(), str(saved("snell")))
    state = load_file(saved("snell") / WEIGHTS)
    head = {"base_model.model.lm_head.weight": model.base_model.model.lm_head.weight.detach().clone()}
    set_peft_model_state_dict(model, state | head)
    with unchanged(model), pytest.raises(ValueError, match="lm_head"):
        set_peft_model_state_dict(model, state | {name: value + 1 for name, value in head.items()})


def test_embeddings_that_peft_saves_are_loaded_if_they_are_the_models(tmp_path: Path) -> None:
    def embedded(value: float = 1.0) -> nn.Module:
        model = base()
        model.embed_tokens = nn.Embedding(4, 16)
        nn.init.constant_(model.embed_tokens.weight, value)
        return model

    get_peft_model(embedded(), make("lora", target_modules=["q_proj", "embed_tokens"])).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    rewrite(tmp_path, lambda t: t.update({"base_model.model.embed_tokens.base_layer.weight": torch.ones(4, 16)}))
    assert load_adapter(str(tmp_path), embedded()).active_adapters == ["default"]
    with pytest.raises(ValueError, match="embed_tokens"):
        load_adapter(str(tmp_path), embedded(2.0))
    model = load_adapter(str(tmp_path), embedded(2.0), trust_base_weights=True)
    assert (model.base_model.model.embed_tokens.base_layer.weight == 1).all()


def test_save_adapter_replaces_the_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = get_peft_model(base(), make("snell"), adapter_name="one")
    save_adapter(model, str(tmp_path / "a"))
    (tmp_path / "a" / "notes.txt").write_text("kept")
    before = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    with monkeypatch.context() as patched:
        patched.setattr(PeftConfig, "save_pretrained", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_adapter(model, str(tmp_path / "a"))
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == before
    save_adapter(model, str(tmp_path / "a"))
    assert sorted(os.listdir(tmp_path)) == ["a"]
    assert sorted(os.listdir(tmp_path / "a")) == ["README.md", CONFIG, WEIGHTS, "notes.txt"]
    assert (tmp_path / "a" / WEIGHTS).read_bytes() != before[WEIGHTS]


def test_a_configuration_from_a_file_makes_new_adapters_of_other_models(saved: Callable[[str], Path]) -> None:
    from dataclasses import replace

    config: Any = replace(PeftConfig.from_pretrained(str(saved("snell"))), inference_mode=False)
    small = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "o_proj": nn.Linear(8, 8)})
    assert get_peft_model(small, config).peft_config["default"].r == 4
