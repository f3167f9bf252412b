"""Configurations survive every way of copying and storing them; the model card says how to load the adapter."""

from __future__ import annotations

import copy
import json
import pickle
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import PeftConfig, get_peft_config

from peft_zoo import Method
from tests.adapters.models import adapted, config

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


@pytest.fixture
def full(method: Method) -> Any:
    """A configuration in which every shared field differs from its default."""
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


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(full: Any, protocol: int) -> None:
    loaded = pickle.loads(pickle.dumps(full, protocol))
    assert loaded == full
    assert loaded.peft_type is full.peft_type


def test_copies(full: Any) -> None:
    shallow, deep = copy.copy(full), copy.deepcopy(full)
    assert shallow == deep == full
    deep.rank_pattern["q_proj"] = 99
    assert full.rank_pattern == {"q_proj": 4}


def test_the_type_and_every_field(method: Method) -> None:
    made = config(method)
    assert made.peft_type == method.peft_type
    assert made.peft_type.value == f"ZOO_{method.name}".upper()
    assert method.tuner_cls.prefix == f"zoo_{method.name}_"
    for field in fields(method.config_cls):
        assert field.metadata.get("help") or field.name in {f.name for f in fields(PeftConfig)}, field.name
    assert method.config_cls().rank_pattern is not method.config_cls().rank_pattern, "defaults are not shared"


def test_what_costs_and_where_from_is_said(method: Method) -> None:
    for text in (method.summary, method.parameters, method.memory, method.flops, method.paper):
        assert text.strip() and "\n" not in text
    assert (method.config_cls.__doc__ or "").strip() and (method.tuner_cls.__doc__ or "").strip()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, r"r=0 cannot be used; use an integer of at least 1"),
    ({"r": -4}, r"r=-4 "),
    ({"r": 2.5}, r"r=2\.5 "),
    ({"r": "8"}, r"r='8' "),
    ({"r": True}, r"r=True "),
    ({"bias": "some"}, r"bias='some' cannot be used; use one of 'none', 'all', '\w+_only'"),
    ({"bias": "lora_only"}, r"bias='lora_only' "),
    ({"target_parameters": "experts.up"}, r"target_parameters='experts.up' cannot be used; use a list"),
    ({"target_modules": ".*q_proj", "layers_to_transform": 0}, r"target_modules='.\*q_proj' .*use a list of names"),
    (
        {"target_modules": "all-linear", "layers_to_transform": [1]},
        r"target_modules='all-linear' .*use a list of names",
    ),
    ({"target_modules": ".*q", "layers_pattern": "h"}, r"target_modules='.\*q' "),
    ({"target_modules": ["q"], "layers_pattern": "h"}, r"layers_pattern='h' .*also set `layers_to_transform`"),
    ({"rank_pattern": ["q_proj"]}, r"rank_pattern=\['q_proj'\] .*use a dict"),
    ({"rank_pattern": None}, r"rank_pattern=None .*use a dict"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_bad_values_are_named_with_a_fix(method: Method, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{method.config_cls.__name__}: {message}"):
        method.config_cls(**changes)


def test_a_pattern_is_checked_when_it_is_applied(method: Method) -> None:
    made = method.config_cls(rank_pattern={"q_proj": 0})
    assert made.for_module("layers.0.k_proj") is made
    with pytest.raises(ValueError, match=r": r=0 cannot be used"):
        made.for_module("layers.0.q_proj")
    assert made.r == method.config_cls().r


def test_lists_become_sets_and_strings_stay(method: Method) -> None:
    made = method.config_cls(target_modules=["a", "b", "a"], exclude_modules=["c"])
    assert (made.target_modules, made.exclude_modules) == ({"a", "b"}, {"c"})
    made = method.config_cls(target_modules="a", exclude_modules="c")
    assert (made.target_modules, made.exclude_modules) == ("a", "c")


def test_unknown_arguments_are_refused(method: Method) -> None:
    with pytest.raises(TypeError, match="nonsense"):
        method.config_cls(nonsense=1)


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

    def test_saving_again_changes_nothing(self, method: Method, tmp_path: Path) -> None:
        model = adapted(method, "llama")
        model.save_pretrained(tmp_path)
        first = (tmp_path / "README.md").read_bytes()
        model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_bytes() == first

    def test_what_the_user_wrote_stays(self, method: Method, tmp_path: Path) -> None:
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
        again = ModelCard.load(tmp_path / "README.md")
        assert again.text.strip() == edited.strip()
        assert {"peft-zoo", f"zoo_{method.name}"} <= set(again.data.tags)

    def test_several_adapters_have_a_card_each(self, method: Method, tmp_path: Path) -> None:
        model = adapted(method, "llama")
        model.add_adapter("other", config(method, target_modules=["k_proj"]))
        model.save_pretrained(tmp_path)
        cards = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("README.md"))
        assert "README.md" in cards
        for path in cards:
            assert (tmp_path / path).read_text().count("## How to load this adapter") == 1
