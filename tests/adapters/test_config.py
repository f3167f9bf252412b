"""Configurations are stored and copied exactly and never changed by use; a model card says how to load the adapter."""

from __future__ import annotations

import copy
import json
import pickle
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel, get_peft_config, get_peft_model, inject_adapter_in_model

import peft_zoo
from peft_zoo import Method
from tests.adapters.models import adapted, config, first, fresh, inputs, layers, output, spread

GENERAL: dict[str, Any] = {
    "r": 12,
    "target_modules": ["q_proj", "k_proj"],
    "exclude_modules": ["v_proj"],
    "target_parameters": ["experts.up"],
    "modules_to_save": ["head"],
    "trainable_token_indices": {"embed_tokens": [1, 2]},
    "layers_to_transform": [0, 3],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 4},
    "bias": "all",
    "fan_in_fan_out": True,
    "init_weights": False,
    "inference_mode": True,
    "base_model_name_or_path": "somebody/something",
    "task_type": "CAUSAL_LM",
    "revision": "main",
}
TRAINABLE = [method for method in peft_zoo.methods().values() if method.trainable]  # also those with peft's LoRA layers
every_trainable = pytest.mark.parametrize("method", TRAINABLE, ids=lambda method: method.name)


@pytest.fixture
def full(method: Method) -> Any:
    """A configuration in which each shared field differs from its default."""
    made = method.config_cls(**GENERAL)
    default = method.config_cls()
    assert all(getattr(made, name) != getattr(default, name) for name in GENERAL)
    return made


def test_json(full: Any, method: Method, tmp_path: Path) -> None:
    full.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json"]
    for loaded in (PeftConfig.from_pretrained(tmp_path), method.config_cls.from_pretrained(tmp_path)):
        assert type(loaded) is method.config_cls
        assert loaded == full
        assert isinstance(loaded.target_modules, set)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == method.peft_type
    assert get_peft_config({k: v for k, v in saved.items() if k != "auto_mapping"}) == full


@pytest.mark.parametrize("protocol", [0, pickle.HIGHEST_PROTOCOL])
def test_pickle(full: Any, protocol: int) -> None:
    loaded = pickle.loads(pickle.dumps(full, protocol))
    assert loaded == full
    assert loaded.peft_type is full.peft_type


def test_copies(full: Any) -> None:
    shallow, deep = copy.copy(full), copy.deepcopy(full)
    assert shallow == deep == full
    deep.rank_pattern["q_proj"] = 99
    assert full.rank_pattern == {"q_proj": 4}


@every_trainable
def test_the_class_describes_the_method(method: Method) -> None:
    made = config(method)
    assert made.peft_type == method.peft_type
    assert made.peft_type.value == f"ZOO_{method.name}".upper()
    for field in fields(method.config_cls):
        if field.name not in PeftConfig.__dataclass_fields__ and field.name in vars(method.config_cls):
            assert field.metadata.get("help"), field.name
    for text in (method.summary, method.parameters, method.memory, method.flops, method.paper):
        assert text.strip() and "\n" not in text
    assert (method.tuner_cls.__doc__ or "").strip()
    method.config_cls(**method.config_cls.conformance.arguments)
    for pattern in method.config_cls.conformance.skips:
        re.compile(pattern)
    assert made.for_training(1000) == made


def test_help_begins_with_the_description_and_the_own_fields(method: Method) -> None:
    first_line, *lines = (method.config_cls.__doc__ or "").splitlines()
    assert first_line.strip()
    listed = [line.split()[0] for line in lines[lines.index("Args:") + 1 :]]
    assert sorted(listed) == sorted(field.name for field in fields(method.config_cls))
    assert listed.index("target_modules") < listed.index("task_type")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r=0 "),
    ({"r": -4}, "r=-4 "),
    ({"r": 2.5}, r"r=2\.5 "),
    ({"r": "8"}, "r='8' "),
    ({"r": True}, "r=True "),
    ({"bias": "some"}, r"bias='some' .*'none', 'all', '\w+_only'"),
    ({"bias": "lora_only"}, "bias='lora_only' "),
    ({"target_parameters": "experts.up"}, "target_parameters='experts.up' "),
    ({"target_modules": ".*q_proj", "layers_to_transform": 0}, "target_modules="),
    ({"target_modules": "all-linear", "layers_to_transform": [1]}, "target_modules="),
    ({"target_modules": ".*q", "layers_pattern": "h"}, "target_modules="),
    ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern='h' .*layers_to_transform"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern="),
    ({"rank_pattern": None}, "rank_pattern=None "),
]


@pytest.mark.parametrize(("method", "case"), spread(range(len(BAD))))
def test_bad_values_are_named_with_a_fix(method: Method, case: int) -> None:
    changes, field = BAD[case]
    with pytest.raises(ValueError, match=f"^{method.config_cls.__name__}: {field}"):
        method.config_cls(**changes)


def test_a_pattern_is_checked_at_once_and_applied_to_a_copy(method: Method) -> None:
    with pytest.raises(ValueError, match=r"rank_pattern\['q_proj'\]=0"):
        method.config_cls(rank_pattern={"q_proj": 0})
    made = method.config_cls(rank_pattern={"q_proj": 2})
    assert made.for_module("layers.0.k_proj") is made
    assert made.for_module("layers.0.q_proj").r == 2
    assert made.r == method.config_cls().r


def test_lists_become_sets_and_strings_stay(method: Method) -> None:
    made = method.config_cls(target_modules=["a", "b", "a"], exclude_modules=["c"])
    assert (made.target_modules, made.exclude_modules) == ({"a", "b"}, {"c"})
    made = method.config_cls(target_modules="a", exclude_modules="c")
    assert (made.target_modules, made.exclude_modules) == ("a", "c")
    with pytest.raises(TypeError, match="nonsense"):
        method.config_cls(nonsense=1)


class TestUse:
    """peft fills in `target_modules` and other fields while it adapts a model; ours do that in a copy."""

    @staticmethod
    def train_save_merge(model: Any, folder: Path) -> None:
        first(model.train()(**inputs("llama"))).square().sum().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
        model.save_pretrained(folder)
        model.merge_adapter()
        model.unmerge_adapter()

    @every_trainable
    @pytest.mark.filterwarnings("ignore:With keep_init=False:UserWarning")  # a second adapter on a quantized base
    @pytest.mark.parametrize("targets", [None, "all-linear"])
    def test_using_a_configuration_leaves_it_unchanged(self, method: Method, targets: Any, tmp_path: Path) -> None:
        chosen = config(method, target_modules=targets)
        before = copy.deepcopy((chosen.to_dict(), vars(chosen)))
        model = get_peft_model(fresh("llama"), chosen)
        self.train_save_merge(model, tmp_path)
        assert (chosen.to_dict(), vars(chosen)) == before
        model.add_adapter("other", chosen)
        inject_adapter_in_model(chosen, fresh("llama"))
        assert (chosen.to_dict(), vars(chosen)) == before
        loaded = PeftModel.from_pretrained(fresh("llama"), tmp_path)
        assert loaded.peft_config["default"].target_modules == model.peft_config["default"].target_modules

    @every_trainable
    def test_one_object_on_two_models_equals_two_objects(self, method: Method) -> None:
        shared, results = config(method), []
        get_peft_model(fresh("llama"), shared)
        for chosen in (shared, config(method)):
            torch.manual_seed(0)
            model = get_peft_model(fresh("bert"), chosen).eval()
            results.append((output(model, "bert"), len(layers(model)), vars(model.peft_config["default"])))
        assert torch.equal(results[0][0], results[1][0])
        assert results[0][1:] == results[1][1:]

    @pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
    def test_peft_itself_writes_two_fields(self, method: Method, task: str) -> None:
        """Outside of the tuner, peft sets the name of the model and adds the head of a classifier."""
        chosen = config(method, target_modules=["query"], task_type=task)
        before, model = copy.deepcopy(vars(chosen)), fresh("bert")
        model.name_or_path = "somebody/bert"
        adapted_model = get_peft_model(model, chosen)
        changed = {key for key, value in vars(chosen).items() if value != before[key]}
        assert changed == {"base_model_name_or_path", "modules_to_save"}
        assert "classifier" in adapted_model.peft_config["default"].modules_to_save
        assert any("classifier.modules_to_save" in k for k, p in adapted_model.named_parameters() if p.requires_grad)


class TestModelCard:
    def test_tags_and_snippet(self, method: Method, tmp_path: Path) -> None:
        adapted(method, "llama").save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.library_name == "peft"
        assert {"peft-zoo", f"zoo_{method.name}"} <= set(card.data.tags)
        assert card.text.count("import peft_zoo") == 1
        assert "pip install peft-zoo" in card.text
        snippet = re.search(r"```python\n(.*?)```", card.text[card.text.index("## How to load") :], re.DOTALL)
        assert snippet is not None
        compile(snippet[1], "card", "exec")

    def test_text_of_the_user_stays(self, method: Method, tmp_path: Path) -> None:
        model = adapted(method, "llama")
        own = "---\nlicense: mit\n---\n# My adapter\n\nIt rhymes.\n"
        (tmp_path / "README.md").write_text(own)
        model.save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert "# My adapter\n\nIt rhymes." in card.text
        assert card.data.license == "mit"
        assert {"peft-zoo", f"zoo_{method.name}"} <= set(card.data.tags)  # peft writes the tags anew each time
        edited = card.text.replace("import peft_zoo", "import peft_zoo, peft")
        card.text = edited
        card.save(tmp_path / "README.md")
        model.save_pretrained(tmp_path)
        saved = (tmp_path / "README.md").read_bytes()
        again = ModelCard.load(tmp_path / "README.md")
        assert again.text.strip() == edited.strip()
        assert {"peft-zoo", f"zoo_{method.name}"} <= set(again.data.tags)
        model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_bytes() == saved, "saving again changes nothing"

    def test_several_adapters_have_a_card_each(self, method: Method, tmp_path: Path) -> None:
        model = adapted(method, "llama")
        model.add_adapter("other", config(method, target_modules=["k_proj"]))
        model.save_pretrained(tmp_path)
        cards = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("README.md"))
        assert "README.md" in cards
        for path in cards:
            assert (tmp_path / path).read_text().count("## How to load this adapter") == 1
