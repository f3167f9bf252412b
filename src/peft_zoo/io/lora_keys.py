"""Tensor names of LoRA files: parses them to module and role, and makes them from both.

A key is `prefix + module + suffix`. Each format has one prefix (it may be empty) and one suffix for each role of a
tensor in a module. No suffix of a format ends in another, so parsing is unambiguous and inverts making. Keys are
compared as plain text; text from a file is never used as a regular expression.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Role(str, Enum):
    """Role of a tensor in the LoRA of its module, in peft's names."""

    A = "lora_A"
    B = "lora_B"
    ALPHA = "alpha"
    MAGNITUDE = "lora_magnitude_vector"
    MAGNITUDE_WEIGHT = "lora_magnitude_vector.weight"  # as the state dict of DoRA layers names it
    BIAS = "lora_bias"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MID = "lora_mid"


@dataclass(frozen=True)
class KeyFormat:
    """Naming scheme of a file format: the beginning of every key, not part of the module name, and the end by role."""

    prefix: str
    suffixes: dict[Role, str]


_PEFT = {
    Role.A: ".lora_A.weight",
    Role.B: ".lora_B.weight",
    Role.BIAS: ".lora_B.bias",
    Role.EMBEDDING_A: ".lora_embedding_A",
    Role.EMBEDDING_B: ".lora_embedding_B",
    Role.MAGNITUDE: ".lora_magnitude_vector",
    Role.MAGNITUDE_WEIGHT: ".lora_magnitude_vector.weight",
}

FORMATS = {
    # save_pretrained of a PeftModel
    "peft": KeyFormat("base_model.model.", _PEFT),
    # pipelines of diffusers today: modules are `unet.….to_q`, `transformer.….to_q`, `text_encoder.….q_proj`
    "diffusers_peft": KeyFormat("", {**_PEFT, Role.ALPHA: ".alpha"}),
    # pipelines of diffusers before they used peft
    "diffusers": KeyFormat("", {Role.A: ".lora.down.weight", Role.B: ".lora.up.weight"}),
    # sd-scripts and its descendants: modules are `lora_unet_…_to_q`, or dotted names in newer trainers
    "kohya": KeyFormat(
        "",
        {
            Role.A: ".lora_down.weight",
            Role.B: ".lora_up.weight",
            Role.ALPHA: ".alpha",
            Role.MAGNITUDE: ".dora_scale",
            Role.MID: ".lora_mid.weight",
        },
    ),
}

HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
"""Ends of the names of LoHa's tensors, in LyCORIS and in peft."""
KRON = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
"""Ends of the names of LoKr's tensors, in LyCORIS and in peft."""

_PREFIXES = tuple(form.prefix for form in FORMATS.values() if form.prefix)
_FACTORS = (Role.A, Role.B, Role.EMBEDDING_A, Role.EMBEDDING_B)
_LONGEST_HINT = 256  # characters; longer keys get no hint, since the search takes quadratic time


def parse_key(fmt: str, key: str) -> tuple[str, Role] | None:
    """Module name and role of a tensor, or None if the key does not follow the format, a key of `FORMATS`."""
    form = FORMATS[fmt]
    if not key.startswith(form.prefix) or (not form.prefix and key.startswith(_PREFIXES)):
        return None
    rest = key[len(form.prefix) :]
    for role, suffix in form.suffixes.items():
        if rest.endswith(suffix) and rest != suffix:
            return rest[: -len(suffix)], role
    return None


def make_key(fmt: str, module: str, role: Role) -> str:
    """Name of a module's tensor in a file of a format; the inverse of `parse_key`, a ValueError if there is none."""
    form = FORMATS[fmt]
    if role not in form.suffixes:
        raise ValueError(f"role={role.value!r}: the format {fmt} has no key for it; drop it or convert.")
    key = form.prefix + module + form.suffixes[role]
    if parse_key(fmt, key) != (module, role):
        raise ValueError(f"module={module!r} cannot be named in the format {fmt}; give the name without a prefix.")
    return key


def is_lora_key(key: str) -> bool:
    """Whether a key looks like that of a LoRA tensor of any format; such keys are never ignored.

    Only what follows the first part of the name counts: the names of modules begin with `lora_unet_` in some files.
    """
    return "lora_" in key.partition(".")[2] or ".lora." in key


def is_lycoris(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is of LyCORIS and not only of plain LoRAs."""
    return any(key.partition(".")[2] in (*HADA, *KRON, "lora_mid.weight") for key in keys)


def nearest_key(fmt: str, key: str) -> str:
    """Valid key of a format that is most similar to an invalid one, for error messages; empty for very long keys."""
    if len(key) > _LONGEST_HINT:
        return ""
    form = FORMATS[fmt]
    rest = key.removeprefix(form.prefix)
    module = rest.partition(".lora")[0] if ".lora" in rest else rest.rpartition(".")[0]
    known = [form.prefix + module + suffix for suffix in form.suffixes.values()]
    return difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]


def detect_format(keys: Iterable[str]) -> str:
    """Detects the format of a file, a key of `FORMATS`, by the keys of its factors (`.alpha` occurs in two formats)."""
    keys = list(keys)
    found: dict[str, str] = {}
    for key in keys:
        for fmt in FORMATS:
            parsed = parse_key(fmt, key)
            if parsed and parsed[1] in _FACTORS:
                found.setdefault(fmt, key)
    if not found:
        known = ", ".join(f"{fmt} ({make_key(fmt, '<module>', Role.A)})" for fmt in FORMATS)
        raise ValueError(f"no LoRA in any known format: the keys are {_shown(keys)}; convert to one of {known}.")
    if len(found) > 1:
        raise ValueError(f"keys of {len(found)} formats in one file, such as {found}; split it or convert it to one.")
    return next(iter(found))


def _shown(keys: list[str]) -> str:
    """Up to three keys, shortened, for an error message."""
    shown = [repr(key if len(key) <= 100 else key[:97] + "...") for key in keys[:3]]
    return ", ".join(shown) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "") if shown else "none"
