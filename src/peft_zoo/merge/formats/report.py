"""What `convert` did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ConvertReport:
    """Result of a conversion.

    Attributes:
        source: Format of the source.
        target: Format of the result.
        modules: Number of adapted modules by part of the model; the name of a model without parts is empty.
        dropped: What `drop` named.
        warnings: What a user of the result should know.

    Examples:
        >>> ConvertReport("kohya", "peft", {"unet": 192}, (), ()).to_dict()["modules"]
        {'unet': 192}
    """

    source: str
    target: str
    modules: dict[str, int]
    dropped: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self)
