"""Changes of the configuration: numbers, types, patterns, expressions, and its text."""

from __future__ import annotations

import json
import random
from typing import Any

from loading_fuzz.drafts import Draft
from loading_fuzz.mutations.registry import mutation

EXPRESSION = r"(([a-z0-9_]+)+\.?)+!"  # takes exponential time on a long name
NUMBERS = (0, 1, -1, -8, 2, 3, 8, 16, 10**6, 10**9, 2**31, 2**63, 10**400, 0.5, 8.5, -0.0, 1e-300, 1e308, -1e308)
CONSTANTS = (float("nan"), float("inf"), float("-inf"))
VALUES = (None, True, False, "", "8", "none", "é" * 5, "a" * 100_000, [], [8], [["q_proj"]], {}, {"q_proj": "8"})
PATTERN_VALUES = (8, 10**6, 10**9, -1, 0, 0.5, 1e308, float("nan"), float("inf"), None, True, "8", [8], {})
LARGE = 3_000_000


def patterns(draft: Draft) -> list[str]:
    """Fields that hold a value for each module."""
    return sorted(name for name, value in draft.config.items() if isinstance(value, dict) or name.endswith("_pattern"))


def numeric(draft: Draft) -> list[str]:
    """Fields with a number."""
    return sorted(name for name, value in draft.config.items() if type(value) in (int, float))


def set_field(draft: Draft, name: str, value: Any) -> None:
    """Sets a field of the configuration."""
    draft.config[name] = value
    draft.subjects.update((name, name.replace("_", " "), str(value)[:100]))


@mutation
def number(draft: Draft, rng: random.Random) -> None:
    """A field with a number gets another one."""
    if names := numeric(draft):
        set_field(draft, rng.choice(names), rng.choice(NUMBERS + CONSTANTS))


@mutation
def rank(draft: Draft, rng: random.Random) -> None:
    """The rank becomes another number or no number."""
    set_field(draft, "r", rng.choice((*NUMBERS, *CONSTANTS, "8", None, True, [8])))


@mutation
def scale(draft: Draft, rng: random.Random) -> None:
    """A field that is called alpha or scale gets another number."""
    names = sorted(name for name in draft.config if name.endswith(("alpha", "scale")))
    if names:
        set_field(draft, rng.choice(names), rng.choice((*NUMBERS, *CONSTANTS, 3, 7.25, -16, "16", None, True)))


@mutation
def any_field(draft: Draft, rng: random.Random) -> None:
    """Any field gets a value of any type."""
    value = rng.choice((*VALUES, *NUMBERS, *CONSTANTS))
    set_field(draft, rng.choice(sorted(draft.config)), value)


@mutation
def nested_value(draft: Draft, rng: random.Random) -> None:
    """A value inside a list or a dictionary of the configuration becomes another, or is left out."""
    holders: list[tuple[str, Any]] = []

    def visit(name: str, holder: Any) -> None:
        for entry in holder.values() if isinstance(holder, dict) else holder:
            if isinstance(entry, (dict, list)) and entry:
                holders.append((name, entry))
                visit(name, entry)

    for name, entry in draft.config.items():
        visit(name, [entry])
    if holders:
        name, holder = rng.choice(holders)
        key = rng.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        draft.subjects.update((name, str(key)))
        if rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = rng.choice((*VALUES, *NUMBERS, *CONSTANTS))


@mutation
def missing_field(draft: Draft, rng: random.Random) -> None:
    """A field is left out."""
    name = rng.choice(sorted(draft.config))
    del draft.config[name]
    draft.subjects.add(name)


@mutation
def unknown_field(draft: Draft, rng: random.Random) -> None:
    """A field that no class has."""
    set_field(draft, "unknown_field", rng.choice((1, {}, "__import__('os')")))


@mutation
def pattern(draft: Draft, rng: random.Random) -> None:
    """A pattern field gets an entry."""
    if names := patterns(draft):
        key = rng.choice(("q_proj", "layers.0.mlp.down_proj", "^model.layers.1.self_attn.q_proj", "nothing", "", "."))
        set_field(draft, rng.choice(names), {key: rng.choice(PATTERN_VALUES)})


@mutation
def pattern_expression(draft: Draft, rng: random.Random) -> None:
    """A pattern field gets a regular expression."""
    if names := patterns(draft):
        key = rng.choice((EXPRESSION, r".*\.q_proj", "(", "[a-z]+_proj", "(?P<a>x)(?P=a)", "q_proj|down_proj"))
        set_field(draft, rng.choice(names), {key: rng.choice(PATTERN_VALUES[:2])})


@mutation
def pattern_type(draft: Draft, rng: random.Random) -> None:
    """A pattern field gets a value that is no dictionary."""
    if names := patterns(draft):
        set_field(draft, rng.choice(names), rng.choice((5, "q_proj", ["q_proj"], True, [["q_proj", 8]])))


@mutation
def target_expression(draft: Draft, rng: random.Random) -> None:
    """Target or excluded modules become a regular expression."""
    expression = rng.choice((EXPRESSION, r".*\.(q_proj|down_proj)", "(", r".*", "all-linear", "q_proj", ""))
    set_field(draft, rng.choice(("target_modules", "exclude_modules")), expression)


@mutation
def targets(draft: Draft, rng: random.Random) -> None:
    """Target or excluded modules become another list, or no list."""
    lists = (["q_proj"], ["nothing"], [], ["q_proj", "down_proj", "v_proj"], [["q_proj"]], {"a": 1}, 3, [5], [""], None)
    name = rng.choice(("target_modules", "target_modules", "exclude_modules"))
    set_field(draft, name, rng.choice((*lists, ["q_proj"] * 100_000, [EXPRESSION])))


@mutation
def layers(draft: Draft, rng: random.Random) -> None:
    """Layers to adapt are given, by number and by name of their list."""
    set_field(draft, "layers_to_transform", rng.choice(([0], 0, [0, 1], [99], "0", [-1], [None])))
    if rng.random() < 0.5:
        set_field(draft, "layers_pattern", rng.choice((["layers"], "layers", [EXPRESSION], EXPRESSION, "(", 5)))


@mutation
def more_modules(draft: Draft, rng: random.Random) -> None:
    """Modules, parameters or tokens to train that the file has no tensors of."""
    name = rng.choice(("modules_to_save", "target_parameters", "trainable_token_indices"))
    set_field(draft, name, rng.choice((["lm_head"], ["nothing"], [0], {"embed_tokens": [0]}, "lm_head", [10**12], 5)))


@mutation
def peft_type(draft: Draft, rng: random.Random) -> None:
    """Another adapter type."""
    kinds = ("LORA", "ZOO_SNELL", "ZOO_RANDLORA", "ZOO_LQ_LORA", "ZOO_CACHED_LORA", "LOHA", "PREFIX_TUNING")
    set_field(draft, "peft_type", rng.choice((*kinds, "NOTHING", 5, None, ["LORA"], {}, "lora")))


@mutation
def imports(draft: Draft, rng: random.Random) -> None:
    """Names of modules that a program might import."""
    name, value = rng.choice(
        (
            ("megatron_core", "antigravity"),
            ("auto_mapping", {"base_model_class": "Evil", "parent_library": "antigravity"}),
            ("base_model_name_or_path", "../../evil"),
            ("revision", "--upload-pack=evil"),
            ("peft_version", "x" * 1000),
            ("task_type", "EVIL"),
        )
    )
    set_field(draft, name, value)
    if name == "megatron_core":
        set_field(draft, "megatron_config", {"a": 1})


@mutation
def config_text(draft: Draft, rng: random.Random) -> None:
    """The configuration is no JSON object, or an unusual one."""
    texts = (b"", b"[1, 2]", b"5", b"null", b"{'a':", b"\xff\xfe{", b"{}", b"NaN", b"[" * 100_000 + b"]" * 100_000)
    nested = b'{"peft_type": "LORA", "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    text = rng.choice((*texts, nested))
    draft.after_config.append(lambda _: text)
    draft.subjects.add(draft.config_name)


@mutation
def config_twice(draft: Draft, rng: random.Random) -> None:
    """A field occurs twice with different values."""
    name = rng.choice(sorted(draft.config))
    value = json.dumps(rng.choice((1000, 1, "x", None))).encode()
    draft.after_config.append(lambda text: text.rstrip()[:-1] + b', "%s": %s}' % (name.encode(), value))
    draft.subjects.update((name, draft.config_name))


@mutation
def config_large(draft: Draft, rng: random.Random) -> None:
    """The configuration has many megabytes."""
    filler = b"1," * (10 * LARGE) if rng.random() < 0.5 else b'"%s",' % (b"a" * 20 * LARGE)
    draft.after_config.append(lambda text: text.rstrip()[:-1] + b', "filler": [' + filler + b"1]}")
    draft.subjects.update(("filler", draft.config_name))
