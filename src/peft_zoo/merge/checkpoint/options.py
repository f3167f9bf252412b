"""Options of `merge_checkpoint`, and the adapters that it merges."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_zoo.common.checks import check, check_choice, check_count, check_int, is_number

DTYPES = ("keep", "float32", "bfloat16", "float16")
QUANTIZED = ("refuse", "dequantize", "requantize", "simulate:nf4", "simulate:fp4")

Adapters = str | Path | Sequence[str | Path] | Mapping[str | Path, float]


@dataclass(frozen=True)
class MergeOptions:
    """Options of `merge_checkpoint`, documented there."""

    dtype: str = "keep"
    rounding: str = "nearest"
    seed: int = 0
    tied: str = "auto"
    vocab: str = "auto"
    quantized: str = "refuse"
    arithmetic: str = "exact"
    max_shard_bytes: int | None = None
    readers: int = 2
    resume: bool = True
    in_memory: bool = False
    trust_patterns: bool = False

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("rounding", self.rounding, ("nearest", "stochastic"))
        check_int("seed", self.seed, 0, 2**63 - 1)
        check_choice("tied", self.tied, ("auto", "share", "refuse"))
        check_choice("vocab", self.vocab, ("auto", "adapter"))
        check_choice("quantized", self.quantized, QUANTIZED)
        check_choice("arithmetic", self.arithmetic, ("exact", "peft"))
        check_count("max_shard_bytes", self.max_shard_bytes)
        check_int("readers", self.readers)
        if self.dtype != "keep" and self.quantized == "requantize":
            raise ValueError(f"dtype={self.dtype!r} with quantized='requantize': the base's format has its own dtype.")
        for name in ("dtype", "rounding", "tied", "vocab", "quantized", "arithmetic"):
            default = type(self).__dataclass_fields__[name].default
            if self.in_memory and getattr(self, name) != default:
                raise ValueError(f"{name}={getattr(self, name)!r} with in_memory=True: peft merges in memory; omit it.")
        if self.rounding == "stochastic" and self.arithmetic == "peft":
            raise ValueError("rounding='stochastic' with arithmetic='peft': peft rounds to the nearest; use 'exact'.")

    @property
    def rounding_seed(self) -> int | None:
        """Seed of stochastic rounding; None to round to the nearest."""
        return self.seed if self.rounding == "stochastic" else None


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter to be merged.

    Attributes:
        name: Name in the report: the last part of the path.
        path: Folder.
        weight: Factor of its update.
    """

    name: str
    path: str
    weight: float = 1.0


def weighted_adapters(
    adapters: Adapters, weights: Sequence[float] | Mapping[str, float] | None
) -> list[WeightedAdapter]:
    """Returns the adapters with their weights; names that occur twice get a number.

    Raises:
        ValueError: If there is no adapter, the numbers of adapters and weights differ, or a weight is not finite.
    """
    if isinstance(adapters, (str, Path)):
        adapters = [adapters]
    if isinstance(adapters, Mapping):
        check(weights is None, "weights", weights, "leave it out, as the adapters are given with their weights")
        paths, factors = [str(path) for path in adapters], list(adapters.values())
    else:
        paths = [str(path) for path in adapters]
        factors = _factors(paths, weights)
    check(len(paths) > 0, "adapter", adapters, "give the folder of at least one adapter")
    for path, factor in zip(paths, factors, strict=True):
        check(is_number(factor), f"weights[{reprlib.repr(path)}]", factor, "use a finite number")
    found: list[WeightedAdapter] = []
    for path, factor in zip(paths, factors, strict=True):
        stem = Path(path).name or path
        count = sum(other.name.partition("#")[0] == stem for other in found)
        found.append(WeightedAdapter(f"{stem}#{count + 1}" if count else stem, path, float(factor)))
    return found


def _factors(paths: Sequence[str], weights: Sequence[float] | Mapping[str, float] | None) -> list[float]:
    """Returns a weight for each path; of a mapping, by path or by its last part."""
    if weights is None:
        return [1.0] * len(paths)
    if not isinstance(weights, Mapping):
        if len(weights) != len(paths):
            raise ValueError(f"weights has {len(weights)} entries for {len(paths)} adapters; give one for each.")
        return list(weights)
    names = {path: path if path in weights else Path(path).name for path in paths}
    unknown = sorted(set(weights) - set(names.values()))
    check(not unknown, "weights", unknown[:1], f"use names of the adapters, {', '.join(names.values())}")
    return [weights.get(name, 1.0) for name in names.values()]
