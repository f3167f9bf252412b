"""Keys are parsed and made without ambiguity, and the format of a file is detected."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_zoo.io.lora_keys import FORMATS, Role, detect_format, is_lora_key, make_key, nearest_key, parse_key

CASES = [(fmt, role) for fmt, form in FORMATS.items() for role in form.suffixes]
WORDS = [
    "unet",
    "lora_A",
    "lora_unet_mid",
    "weight",
    "lora",
    "alpha",
    "0",
    "to_q",
    "base_model",
    "model",
    "é",
    "",
    "(.*)+",
]
MODULES = st.lists(st.sampled_from(WORDS) | st.text("ab_-.0*\\", max_size=5), min_size=1, max_size=6).map(".".join)
KEYS = st.builds(
    lambda prefix, module, suffix: prefix + module + suffix,
    st.sampled_from(["", "base_model.model.", "base_model.", "unet.", "lora_unet_"]),
    MODULES,
    st.sampled_from(
        sorted({s for form in FORMATS.values() for s in form.suffixes.values()} | {"", ".weight", ".lora_E"})
    ),
)


@pytest.mark.parametrize(
    ("fmt", "key", "module", "role"),
    [
        ("peft", "base_model.model.h.0.q.lora_A.weight", "h.0.q", Role.A),
        ("peft", "base_model.model.h.0.q.lora_B.bias", "h.0.q", Role.BIAS),
        ("peft", "base_model.model.wte.lora_embedding_B", "wte", Role.EMBEDDING_B),
        ("peft", "base_model.model.q.lora_magnitude_vector", "q", Role.MAGNITUDE),
        ("peft", "base_model.model.q.lora_magnitude_vector.weight", "q", Role.MAGNITUDE_WEIGHT),
        ("diffusers_peft", "unet.mid_block.to_q.lora_B.weight", "unet.mid_block.to_q", Role.B),
        ("diffusers", "unet.mid_block.to_q.lora.down.weight", "unet.mid_block.to_q", Role.A),
        ("diffusers", "unet.mid_block.to_q.lora.up.weight", "unet.mid_block.to_q", Role.B),
        ("kohya", "lora_unet_mid_block_to_q.lora_down.weight", "lora_unet_mid_block_to_q", Role.A),
        ("kohya", "lora_unet_mid_block_to_q.alpha", "lora_unet_mid_block_to_q", Role.ALPHA),
        ("kohya", "lora_te1_fc1.dora_scale", "lora_te1_fc1", Role.MAGNITUDE),
        ("kohya", "lora_unet_conv.lora_mid.weight", "lora_unet_conv", Role.MID),
        ("kohya", "diffusion_model.blocks.0.q.lora_up.weight", "diffusion_model.blocks.0.q", Role.B),
    ],
)
def test_keys_as_they_are_found_in_files(fmt: str, key: str, module: str, role: Role) -> None:
    assert parse_key(fmt, key) == (module, role)
    assert make_key(fmt, module, role) == key


@settings(max_examples=50)
@given(key=KEYS)
def test_a_key_that_is_read_is_made_again(key: str) -> None:
    for fmt in FORMATS:
        parsed = parse_key(fmt, key)
        assert parsed is None or make_key(fmt, *parsed) == key


@settings(max_examples=50)
@given(case=st.sampled_from(CASES), module=MODULES)
def test_a_key_that_is_made_is_read_again(case: tuple[str, Role], module: str) -> None:
    fmt, role = case
    try:
        key = make_key(fmt, module, role)
    except ValueError:
        # Without a module there is no key, and one format's prefix is not another's module.
        assert not module or (not FORMATS[fmt].prefix and module.startswith("base_model.model."))
    else:
        assert parse_key(fmt, key) == (module, role)


@settings(max_examples=50)
@given(key=KEYS)
def test_no_format_swallows_the_keys_of_another(key: str) -> None:
    reading = [fmt for fmt in FORMATS if parse_key(fmt, key)]
    assert len(reading) <= 1 or key.endswith(".alpha")


def test_suffixes_leave_no_choice() -> None:
    for form in FORMATS.values():
        assert not any(a.endswith(b) for a, b in itertools.permutations(form.suffixes.values(), 2))
        assert len(set(form.suffixes.values())) == len(form.suffixes)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_format_is_recognized_among_other_tensors(fmt: str) -> None:
    keys = [make_key(fmt, "some.module", role) for role in FORMATS[fmt].suffixes]
    assert detect_format(["base_model.model.score.weight", *keys, "x"]) == fmt


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "the keys are none"),
        (
            ["text_encoder:0:down", "text_encoder:0:up", "unet:0:down", "unet:0:up", "<s1>"],
            "the keys are 'text_encoder:0:down', 'text_encoder:0:up', 'unet:0:down' and 2 more; convert to one of peft",
        ),
        (["lora_unet_x.alpha"], "no LoRA in any known format"),
        (["a" * 1000], "the keys are '" + "a" * 97 + "[.]{3}'"),
        (["u.lora_A.weight", "lora_u.lora_up.weight"], r"2 formats in one file, such as .*u\.lora_A\.weight.*lora_up"),
    ],
)
def test_no_format_or_several_are_named(keys: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detect_format(keys)


@pytest.mark.parametrize(
    ("fmt", "key", "nearest"),
    [
        ("peft", "base_model.model.q.lora_A.default.weight", "base_model.model.q.lora_A.weight"),
        ("peft", "base_model.model.q.lora_bias", "base_model.model.q.lora_B.bias"),
        ("peft", "q.lora_B.weight", "base_model.model.q.lora_B.weight"),
        ("kohya", "lora_unet_q.lora_dwn.weight", "lora_unet_q.lora_down.weight"),
        ("diffusers", "q.lora.down", "q.lora.down.weight"),
        ("kohya", "x.lora_" + "." * 100_000, ""),
    ],
)
def test_the_nearest_key_is_found(fmt: str, key: str, nearest: str) -> None:
    assert is_lora_key(key) and parse_key(fmt, key) is None
    assert nearest_key(fmt, key) == nearest


def test_what_a_format_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="role='lora_bias'"):
        make_key("kohya", "lora_unet_q", Role.BIAS)
    with pytest.raises(ValueError, match=r"module='base_model\.model\.q'"):
        make_key("kohya", "base_model.model.q", Role.A)
