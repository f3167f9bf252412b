"""Recipes: validation, and saving, loading and running them as a peft adapter."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from peft_zoo import CachedLoraConfig, compose
from peft_zoo.adapters.cached_lora.model import CachedLoraModel
from tests.adapters.cached_lora.samples import KINDS, NAMES, SCHEDULERS, add_loras, call, denoiser, generate, inputs

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def base(kind: str = "class") -> Any:
    """The same denoiser every time, without LoRAs."""
    torch.manual_seed(0)
    return KINDS[kind].make().eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three saved LoRAs for `base()`."""
    found = {}
    for name in NAMES:
        config = LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False)
        folder = tmp_path_factory.mktemp(name)
        plain = base()
        torch.manual_seed(len(found))
        get_peft_model(plain, config).save_pretrained(folder)
        found[name] = str(folder)
    return found


# ---- fields ----


NAN, INF = math.nan, math.inf
INVALID: dict[str, list[Any]] = {  # values by the field that the error names
    "adapters": [["a", "a"], ["a.b"], "a", {"a": 5}, {"a": ""}, {}, []],
    "method": ["average", None, ["merge"]],
    "order": [[], "random", "profile", ["a"], ["a", "b", "a"], ["a", "b", "c"], 3, [1, 2]],
    "high": [["c"], ["a", "a"], 1],
    "low": [["c"], "ab"],
    "weights": [[1.0], {"c": 1.0}, {"a": "big"}, 0.5, {"a": NAN}, [1.0, INF], [1.0, True], [1.0, np.True_]],
    "phase_border": [1.5, -0.1, "x", NAN],
    "switch_every": [0, 1.5],
    "cache_early": [1.5],
    "cache_middle": [-1],
    "cache_borders": [[0.9, 0.1], [0.9], 0.5, [0.1, "x"], None],
    "max_age": [-1],
    "dominance_init": [0, "n-0.5"],
    "dominance_decay": [1.0, None],
    "dominance_floor": [-1, INF],
    "cache": ["no"],
    "batched": [1],
    "profile": [[0.5], {"a": NAN, "b": 0.5}],
}


@pytest.mark.parametrize("field", INVALID)
def test_a_field_that_cannot_work_is_named(field: str) -> None:
    for value in INVALID[field]:
        with pytest.raises(ValueError, match=rf"CachedLoraConfig: {field}="):
            CachedLoraConfig(**{"adapters": ["a", "b"], field: value})


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"high": ["a"], "low": ["a", "b"]}, "high=.*low="),
        ({"high": ["a"], "low": []}, "high=.*low="),
        ({"method": "w_switch", "weights": [0, 0]}, "weights="),
        ({"method": "w_switch", "weights": [-1, 2]}, "weights="),
        ({"profile": {"a": 0.5}, "order": "profile"}, r"profile=.*\['b'\]"),
        ({"adapters": None, "order": []}, "order="),
    ],
)
def test_fields_that_do_not_go_together_are_named(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        CachedLoraConfig(**{"adapters": ["a", "b"], **settings})


def test_the_ends_of_ranges_can_be_used() -> None:
    CachedLoraConfig(phase_border=0, dominance_decay=0, dominance_floor=0, cache_borders=(0, 1), dominance_init=1e-9)
    CachedLoraConfig(phase_border=1, dominance_decay=0.999, cache_borders=[1, 1], weights={"a": -1}, max_age=0)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    half, names = np.float32(0.5), ["a", "b"]
    given = {"weights": {"a": half, "b": np.int64(2)}, "profile": {"a": half, "b": np.float16(0.25)}}
    config = CachedLoraConfig(adapters=names, phase_border=half, cache_borders=(half, np.float64(1)), **given)
    config.save_pretrained(str(tmp_path))
    again = PeftConfig.from_pretrained(str(tmp_path))
    assert again == config and again.weights == {"a": 0.5, "b": 2.0} and again.cache_borders == (0.5, 1.0)


def test_a_profile_gives_order_and_phases() -> None:
    config = CachedLoraConfig(adapters=["a", "b", "c"], order="profile", profile={"a": 0.1, "b": 0.9, "c": 0.8})
    roles = config.roles(["a", "b", "c"])
    assert (roles.order, roles.high, roles.low) == (("b", "c", "a"), ("b", "c"), ("a",))


def test_a_recipe_survives_its_file(tmp_path: Path) -> None:
    config = CachedLoraConfig(
        adapters={"z": "org/z", "a": "org/a", "m": None},
        method="cmlora",
        weights=[0.5, 1.0, 2.0],
        high=["m"],
        cache_borders=(0.2, 0.8),
        profile={"z": 0.1, "a": 0.2, "m": 0.7},
        batched=True,
    )
    config.save_pretrained(str(tmp_path))
    again = PeftConfig.from_pretrained(str(tmp_path))
    assert again == config
    assert isinstance(again, CachedLoraConfig)
    assert again.roles(["z", "a", "m"]).order == ("z", "a", "m"), "JSON sorts the keys, and the order is kept"
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "ZOO_CACHED_LORA" and saved["weights"] == {"z": 0.5, "a": 1.0, "m": 2.0}


# ---- as an adapter of peft ----


def test_get_peft_model_loads_and_composes(folders: dict[str, str]) -> None:
    model = get_peft_model(base(), CachedLoraConfig(adapters=folders, method="composite"))
    assert isinstance(model.base_model, CachedLoraModel)
    sample, condition = inputs("class")
    expected = []
    for folder in folders.values():
        expected.append(call(PeftModel.from_pretrained(base(), folder), sample, 500.0, condition))
    assert (expected[0] - expected[1]).abs().max() > 1e-4
    # Three float32 predictions, added in one order and in another.
    torch.testing.assert_close(
        call(model, sample, 500.0, condition), torch.stack(expected).mean(0), rtol=1e-5, atol=1e-6
    )
    with model.disable_adapter():
        assert torch.equal(call(model, sample, 500.0, condition), call(base(), sample, 500.0, condition))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_both_doors_are_one(folders: dict[str, str]) -> None:
    model = get_peft_model(base(), CachedLoraConfig(adapters=folders, switch_every=1))
    first, second, third = (SCHEDULERS["ddim"]() for _ in range(3))
    with compose(model, scheduler=first) as c:
        through_peft = generate(model, "class", first, steps=4)
    assert [step.progress for step in c.trace()] == [0, 0.25, 0.5, 0.75]

    loaded = PeftModel.from_pretrained(base(), folders["one"], adapter_name="one")
    for name in NAMES[1:]:
        loaded.load_adapter(folders[name], name)
    with compose(loaded, CachedLoraConfig(adapters=list(NAMES), switch_every=1), scheduler=second):
        assert torch.equal(generate(loaded, "class", second, steps=4), through_peft)
    generate(model, "class", third, steps=4)
    # Without a scheduler it is read off the timesteps.
    read_off = [step.progress for step in model.base_model.composition.trace()]
    assert read_off == pytest.approx([1 - t / 751 for t in (751, 501, 251, 1)])


@pytest.mark.parametrize("how", ["model", "config"])
def test_a_saved_recipe_is_loaded(folders: dict[str, str], tmp_path: Path, how: str) -> None:
    config = CachedLoraConfig(adapters=folders, method="switch")
    model = get_peft_model(base(), config)
    (model if how == "model" else config).save_pretrained(str(tmp_path))
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert size < 1000, "no weights but those of the LoRAs, in their own files"
    again = PeftModel.from_pretrained(base(), str(tmp_path))
    sample, condition = inputs("class")
    assert torch.equal(call(again, sample, 500.0, condition), call(model, sample, 500.0, condition))
    assert again.peft_config["default"].adapters == folders


def test_files_of_diffusers_are_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = KINDS["sd"].make().eval()
    blank = copy.deepcopy(trained)
    add_loras(trained, ["style"], ["to_q", "to_v"])
    trained.save_lora_adapter(tmp_path, adapter_name="style", weight_name="pytorch_lora_weights.safetensors")
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({f"unet.{name}": tensor for name, tensor in load_file(file).items()}, file)
    model = get_peft_model(blank, CachedLoraConfig(adapters={"style": str(file)}, method="switch"))
    sample, condition = inputs("sd")
    assert torch.equal(call(model, sample, 500.0, condition), call(trained, sample, 500.0, condition))


def test_unload_gives_the_base_back(folders: dict[str, str]) -> None:
    plain = base()
    model = get_peft_model(plain, CachedLoraConfig(adapters=folders))
    assert model.unload() is plain
    assert "forward" not in vars(plain) and not hasattr(plain, "peft_config")
    assert not any(isinstance(module, LoraLayer) for module in plain.modules())
    sample, condition = inputs("class")
    assert torch.equal(call(plain, sample, 500.0, condition), call(base(), sample, 500.0, condition))


def test_what_a_recipe_cannot_do_is_said(folders: dict[str, str]) -> None:
    model = get_peft_model(base(), recipe := CachedLoraConfig(adapters=folders))
    for refused in (
        model.merge_and_unload,
        model.merge_adapter,
        lambda: model.add_adapter("other", recipe),
        lambda: model.delete_adapter("default"),
    ):
        with pytest.raises(NotImplementedError, match="CachedLoraModel"):
            refused()
    model.set_adapter("default")
    assert model.active_adapter == "default" and list(model.peft_config) == ["default"]


def test_a_recipe_is_never_changed_by_using_it(folders: dict[str, str], tmp_path: Path) -> None:
    """Two pipelines share one, which is deep-compared; each gives what a fresh one gives."""

    def recipe() -> CachedLoraConfig:
        return CachedLoraConfig(adapters=folders, weights=[0.5, 1.0, 2.0], high=["two"], cache_borders=(0.2, 0.8))

    config = recipe()
    before = copy.deepcopy(vars(config))

    def generated(config: CachedLoraConfig, kind: str) -> Any:
        model = denoiser(kind)
        pipe = SimpleNamespace(unet=model, scheduler=SCHEDULERS["ddim"]())
        with compose(pipe, config) as composition:
            images = generate(model, kind, pipe.scheduler, steps=3)
        return images, composition.trace()

    for kind in ("class", "dit"):
        (images, trace), (expected, fresh) = (generated(one, kind) for one in (config, recipe()))
        assert torch.equal(images, expected) and trace == fresh
    model = get_peft_model(base(), config)
    call(model, *inputs("class")[:1], 500.0, inputs("class")[1])
    model.save_pretrained(str(tmp_path))
    model.unload()
    assert vars(config) == before


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
def test_a_recipe_that_fails_leaves_the_model_alone(folders: dict[str, str], tmp_path: Path) -> None:
    get_peft_model(base(), LoHaConfig(r=2, target_modules=["to_q"])).save_pretrained(tmp_path)
    plain = base()
    cases = {
        "'loha'.*LOHA": {**folders, "loha": str(tmp_path)},
        "'gone'.*adapter_config.json": {**folders, "gone": str(tmp_path / "gone")},
        "adapters=.*'never'": {**folders, "never": None},
    }
    for match, adapters in cases.items():
        with pytest.raises(ValueError, match=match):
            get_peft_model(plain, CachedLoraConfig(adapters=adapters))
        assert not any(isinstance(module, LoraLayer) for module in plain.modules()), match
        assert all(parameter.requires_grad for parameter in plain.parameters())
        assert not hasattr(plain, "peft_config")
    loaded = denoiser("class", ["one"])
    with pytest.raises(ValueError, match=r"\['one'\] are on UNet2DModel"):
        get_peft_model(loaded, CachedLoraConfig(adapters=folders))
    with pytest.raises(ValueError, match=r"adapters=.*never"):
        get_peft_model(loaded, CachedLoraConfig(adapters={"two": folders["two"], "never": None}))
    assert {name for m in loaded.modules() if isinstance(m, LoraLayer) for name in m.scaling} == {"one"}


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
def test_adapters_that_are_there_may_be_named(folders: dict[str, str]) -> None:
    loaded = denoiser("class", ["one"])
    model = get_peft_model(loaded, CachedLoraConfig(adapters={"one": None, "two": folders["two"]}, method="switch"))
    assert model.base_model.composition.adapters == ("one", "two")
    model.unload()
    assert {name for m in loaded.modules() if isinstance(m, LoraLayer) for name in m.scaling} == {"one"}
