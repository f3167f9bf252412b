"""What stands in the `config.json` of a quantized model without its base."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from peft_zoo.adapters.lq_lora.config import nf_config

__all__ = ["NFkConfig"]

METHOD = "nfk"


@dataclass(kw_only=True)
class NFkConfig(QuantizationConfigMixin):
    """Which modules of a model are quantized and how: what stands in its `config.json`; `standalone` writes it.

    Attributes:
        modules: From the name of a module to the five values of its `NFConfig`.
        ranks: From the name to the rank of the part of low rank; what is not named has none.
        quant_method: Always "nfk".

    Raises:
        ValueError: For a field that cannot be meant, naming it, the value and the fix.
    """

    modules: dict[str, list[Any]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    quant_method: str = METHOD  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self._require(self.quant_method == METHOD, "quant_method", f"it is always {METHOD!r}")
        valid = isinstance(self.modules, dict) and len(self.modules) > 0
        self._require(valid, "modules", "use a dict from the name of a module to five values")
        self.modules = {name: self._way(name, way) for name, way in self.modules.items()}
        self._require(isinstance(self.ranks, dict), "ranks", "use a dict from the name of a module to a rank")
        for name, rank in self.ranks.items():
            if name not in self.modules:
                raise ValueError(f"NFkConfig: ranks names {name!r}, which modules lacks; leave it out.")
            if type(rank) is not int or rank < 0:
                raise ValueError(f"NFkConfig: ranks[{name!r}]={rank!r} cannot be used; use an integer from 0.")

    def _way(self, name: str, way: Any) -> list[Any]:
        try:
            return list(nf_config(way))
        except ValueError as error:
            raise ValueError(f"NFkConfig: modules[{name!r}]: {error}") from error

    def _require(self, condition: bool, name: str, fix: str) -> None:
        if not condition:
            raise ValueError(f"NFkConfig: {name}={getattr(self, name)!r} cannot be used; {fix}.")
