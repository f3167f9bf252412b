"""Quantization entry in the `config.json` of a standalone quantized model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from peft_zoo.adapters.lq_lora.config import nf_config
from peft_zoo.common.checks import require

METHOD = "nfk"


@dataclass(kw_only=True)
class NFkConfig(QuantizationConfigMixin):
    """Quantization config of each module of a standalone model; `standalone` writes it.

    Attributes:
        modules: The five values of an `NFConfig` by module name.
        ranks: Rank of the low-rank part by module name; modules that are missing have none.
        quant_method: Always "nfk".

    Raises:
        ValueError: If a field is invalid, naming the field, its value and the fix.
    """

    modules: dict[str, list[Any]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    quant_method: str = METHOD  # type: ignore[assignment]

    def __post_init__(self) -> None:
        require(self.quant_method == METHOD, self, "quant_method", f"it is always {METHOD!r}")
        valid = isinstance(self.modules, dict) and len(self.modules) > 0
        require(valid, self, "modules", "use a dict from module name to five values")
        self.modules = {name: self._listed(name, value) for name, value in self.modules.items()}
        require(isinstance(self.ranks, dict), self, "ranks", "use a dict from module name to rank")
        for name, rank in self.ranks.items():
            if name not in self.modules:
                raise ValueError(f"NFkConfig: ranks names {name!r}, which modules lacks; leave it out.")
            if type(rank) is not int or rank < 0:
                raise ValueError(f"NFkConfig: ranks[{name!r}]={rank!r} cannot be used; use an integer from 0.")

    def _listed(self, name: str, value: Any) -> list[Any]:
        try:
            return list(nf_config(value))
        except ValueError as error:
            raise ValueError(f"NFkConfig: modules[{name!r}]: {error}") from error
