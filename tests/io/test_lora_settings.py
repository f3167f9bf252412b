"""Ranks and scales read from a configuration are those of peft; other configurations are refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from peft_zoo.io.lora_settings import DIFFUSERS_METADATA, diffusers_settings, read_settings

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}

# Names in which an unescaped dot fits nothing but a dot.
NAMES = st.lists(st.sampled_from(["layers", "0", "1", "q", "k-v", "q_proj"]), min_size=1, max_size=4).map(".".join)
PATTERNS = st.builds(
    lambda start, name, end: start + name + end,
    st.sampled_from(["", "^"]),
    NAMES | NAMES.map(re.escape),
    st.sampled_from(["", "$"]),
)


@settings(max_examples=60)
@given(keys=st.lists(PATTERNS, unique=True, max_size=5), module=NAMES)
def test_patterns_match_the_same_modules_as_in_peft(keys: list[str], module: str) -> None:
    ranks = {key: place + 10 for place, key in enumerate(keys)}
    alphas = {key: place + 0.5 for place, key in enumerate(reversed(keys))}
    found = read_settings({**PLAIN, "rank_pattern": ranks, "alpha_pattern": alphas}).of(module)
    assert found.rank == ranks.get(get_pattern_key(list(ranks), module), 4)
    assert found.alpha == alphas.get(get_pattern_key(list(alphas), module), 6)
    assert found.scale == found.alpha / found.rank


def test_scales() -> None:
    assert read_settings(PLAIN).of("q") == (4, 6.0, 1.5)
    assert read_settings({**PLAIN, "use_rslora": True}).of("q") == (4, 6.0, 3.0)
    assert read_settings({**PLAIN, "use_rslora": True, "rank_pattern": {"q": 9}}).of("h.q") == (9, 6.0, 2.0)
    assert read_settings({**PLAIN, "lora_alpha": -0.5}).of("q").scale == -0.125
    assert read_settings({**PLAIN, "rank_pattern": None, "alpha_pattern": None}).of("q").scale == 1.5


def test_a_lora_inside_a_wrapped_layer_has_the_wrappers_settings() -> None:
    settings = read_settings({**PLAIN, "alpha_pattern": {"attn": 12}})
    assert settings.of("h.attn.base_layer.out_proj").alpha == settings.of("h.attn").alpha == 12
    assert settings.of("h.attn.out_proj").alpha == 6


@pytest.mark.parametrize(
    "key", ["(a+)+$", "layers.*q", ".*", "[qk]", "q|k", "q?", "a{2}", "q^", "$q", r"\d", r"\w+", "q\\", r"q\$", "(?i)q"]
)
def test_an_expression_is_refused_and_never_run(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("compile", "match", "fullmatch", "search"):
        monkeypatch.setattr(re, function, lambda *args, **kwargs: pytest.fail("an expression was compiled"))
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ValueError) as caught:
            read_settings({**PLAIN, field: {key: 8}})
        assert str(caught.value).startswith(f"{field}[{key!r}]: ")


@pytest.mark.parametrize("value", [0, -1, 1_000_000, 1e6, 8.0, True, None, "8", [8], 10**400])
def test_an_impossible_rank_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^r="):
        read_settings({**PLAIN, "r": value})
    with pytest.raises(ValueError, match=r"^rank_pattern\['q'\]="):
        read_settings({**PLAIN, "rank_pattern": {"q": value}})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, True, None, "8", [8]])
def test_an_impossible_alpha_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^lora_alpha="):
        read_settings({**PLAIN, "lora_alpha": value})
    with pytest.raises(ValueError, match=r"^alpha_pattern\['q'\]="):
        read_settings({**PLAIN, "alpha_pattern": {"q": value}})


def test_other_impossible_values_are_named() -> None:
    with pytest.raises(ValueError, match="use_rslora='false'"):
        read_settings({**PLAIN, "use_rslora": "false"})
    with pytest.raises(ValueError, match=r"rank_pattern=\['q'\]"):
        read_settings({**PLAIN, "rank_pattern": ["q"]})


@pytest.mark.parametrize("kind", ["ADALORA", "XLORA", "ZOO_SNELL", "lora", None, ["LORA"]])
def test_other_adapters_are_named(kind: Any) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(f"peft_type={kind!r}")):
        read_settings({**PLAIN, "peft_type": kind})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 4], [2, 5]]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("ensure_weight_tying", True),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1e-4}),
        ("monteclora_config", {"num_samples": 8}),
        ("velora_config", {"num_groups": 64}),
        ("arrow_config", {"top_k": 3}),
        ("megatron_config", {"hidden_size": 8}),
        ("use_what_peft_invents_next", True),
        ("future_config", {"scale": 2}),
    ],
)
def test_updates_that_are_no_plain_product_are_named(field: str, value: Any) -> None:
    with pytest.raises(NotImplementedError, match=f"'{field}'="):
        read_settings({**PLAIN, field: value})
    read_settings({**PLAIN, field: type(value)()})  # switched off


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_initializations_that_change_the_base_are_refused(start: str) -> None:
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}'"):
        read_settings({**PLAIN, "init_lora_weights": start})


def test_whatever_peft_saves_by_default_is_read() -> None:
    config = json.loads(json.dumps(LoraConfig(r=4, lora_alpha=6).to_dict(), default=list))
    for start in (True, False, "gaussian", "eva", "orthogonal", "mica"):
        assert read_settings({**config, "init_lora_weights": start}).of("q").scale == 1.5


def test_parts_of_a_diffusers_file_have_their_own_settings() -> None:
    config = json.loads(json.dumps(LoraConfig(r=4, lora_alpha=6).to_dict(), default=list))
    text = {**config, "r": 9, "use_rslora": True, "alpha_pattern": {"^layers.0.q": 3}}
    packed = {f"unet.{key}": value for key, value in config.items()}
    packed |= {f"text_encoder.{key}": value for key, value in text.items()}
    of = diffusers_settings({"format": "pt", DIFFUSERS_METADATA: json.dumps(packed)})
    assert of("unet.mid.to_q") == (4, 6.0, 1.5)
    assert of("text_encoder.layers.0.q") == (9, 3.0, 1.0)
    assert of("text_encoder.layers.1.q") == (9, 6.0, 2.0)
    assert of("vae.q") is None
    assert diffusers_settings({DIFFUSERS_METADATA: json.dumps(config)})("mid.to_q") == (4, 6.0, 1.5)
    assert diffusers_settings({"format": "pt"})("unet.mid.to_q") is None


def test_hostile_metadata_is_refused() -> None:
    with pytest.raises(ValueError, match=f"metadata '{DIFFUSERS_METADATA}'"):
        diffusers_settings({DIFFUSERS_METADATA: "[]"})
    with pytest.raises(ValueError, match="r=1000000"):
        diffusers_settings({DIFFUSERS_METADATA: '{"unet.r": 1000000, "unet.lora_alpha": 1}'})
    with pytest.raises(NotImplementedError, match="'use_qalora'=True"):
        diffusers_settings({DIFFUSERS_METADATA: '{"r": 4, "lora_alpha": 1, "use_qalora": true}'})
