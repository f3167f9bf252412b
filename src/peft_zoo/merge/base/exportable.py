"""How well each type of adapter can be written as a plain LoRA, and what that takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

Exportable = Literal["exact", "approximate", "with_base", "no"]
CHOICES = get_args(Exportable)

PEFT_TYPES: dict[str, Exportable] = {
    # s B A, or a product of two factors that a formula gives
    **dict.fromkeys(("LORA", "ADALORA", "DELORA", "GRALORA", "LOHA", "LOKR", "MISS", "PVERA"), "exact"),
    **dict.fromkeys(("UNILORA", "VBLORA", "VERA"), "exact"),
    # an update of high rank that does not depend on the base weights
    **dict.fromkeys(("C3A", "FOURIERFT", "RANDLORA", "SHIRA", "WAVEFT"), "approximate"),
    # base weights that are multiplied, rotated or normalized, or factors made of the base weights
    **dict.fromkeys(("ADAMSS", "BOFT", "DEFT", "FROD", "GLORA", "HIRA", "HRA", "IA3", "OFT", "OSF"), "with_base"),
    **dict.fromkeys(("PEANUT", "PSOFT", "ROAD", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS"), "with_base"),
    # prompts, biases and norms, or an update that depends on the input
    **dict.fromkeys(("ADAPTION_PROMPT", "BEFT", "CARTRIDGE", "CPT", "LILY", "LN_TUNING", "P_TUNING", "POLY"), "no"),
    **dict.fromkeys(("MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "SHADOW", "XLORA"), "no"),
}
"""The types of peft; those of peft-zoo are asked by `exportable` of their configuration class."""

DERIVED = ("ADAMSS", "FROD", "OSF", "PSOFT")
"""Types whose layers are made from the base weights while they are added, and are not in the adapter's file."""


def derived_by(fields: Mapping[str, Any]) -> str | None:
    """Returns the field because of which the layers of an adapter are made from the base weights; None if none is.

    Such an adapter needs the whole base model: its file does not have what its layers made of the weights.

    Args:
        fields: Fields of `adapter_config.json`.

    Examples:
        >>> derived_by({"peft_type": "OSF"}), derived_by({"peft_type": "LORA"})
        ("peft_type='OSF'", None)
    """
    kind = str(fields.get("peft_type"))
    if kind in DERIVED:
        return f"peft_type={kind!r}"
    if kind == "SUPERTUNING" and not fields.get("save_precomputed_indices", True):
        return "save_precomputed_indices=False"
    return None


def exportable(kind: str | PeftConfig) -> Exportable:
    """Returns how well a type of adapter, or an adapter with a configuration, can be written as a plain LoRA.

    Args:
        kind: Type as in `adapter_config.json`, such as `"VERA"`, or a configuration. A configuration may need more than
            its type: a LoRA with `use_dora` needs its base weights.

    Returns:
        `"exact"`: as it is, but for rounding. `"approximate"`: to an error, without the base weights. `"with_base"`: to
        an error, with the base weights. `"no"`: it changes no weight of a layer, or not by the same matrix for every
        input.

    Raises:
        ValueError: If the type is not registered in peft.

    Examples:
        >>> from peft import LoraConfig
        >>> exportable("LORA"), exportable(LoraConfig(use_dora=True)), exportable("PROMPT_TUNING")
        ('exact', 'with_base', 'no')
    """
    name = str(getattr(kind.peft_type, "value", kind.peft_type)) if isinstance(kind, PeftConfig) else kind
    config_cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(name)  # type: ignore[call-overload]
    found: Any = PEFT_TYPES.get(name, getattr(config_cls, "exportable", None))
    if config_cls is None or found not in CHOICES:
        known = config_cls is not None
        fix = "add it to the table" if known else "import peft_zoo, or the package that registers it, first"
        raise ValueError(f"peft_type={name!r} is {'not known to export' if known else 'no registered type'}; {fix}.")
    if isinstance(kind, PeftConfig) and found != "no" and dependence(kind):
        return "with_base"
    answer: Exportable = found
    return answer


def dependence(config: PeftConfig) -> str | None:
    """Returns the field and value that make the update of an otherwise exact type depend on the base weights."""
    if getattr(config, "use_dora", False):
        return "use_dora=True"
    bat = config.peft_type == "MISS" and getattr(config, "init_weights", None) == "bat"
    return "init_weights='bat'" if bat else None
