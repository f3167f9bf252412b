"""Options of `combine`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from peft_zoo.common.checks import check, check_choice, check_count, check_int, is_number
from peft_zoo.kernels.combining.elementwise import Elementwise, Rule, Sign

CombineMethod = Literal[
    "cat", "linear", "ties", "dare_ties", "dare_linear", "magnitude_prune", "slerp", "orthogonal", "tsv", "iso"
]
Space = Literal["auto", "delta", "factors", "knots", "core"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPACES: dict[str, tuple[str, ...]] = {"linear": ("delta", "factors")}
"""Spaces of a method; the methods by entry have all of them, the others none but `"delta"`."""


def module_seed(seed: int, name: str) -> int:
    """Returns the seed of one weight, so that DARE drops other entries of each; a seed out of range is a ValueError."""
    check_int("seed", seed, 0, 2**63 - 1)
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return (seed ^ int.from_bytes(digest, "little")) % 2**63


@dataclass(frozen=True)
class CombineOptions:
    """How LoRAs are combined.

    Attributes:
        method: `"cat"` (default): the exact weighted sum, of rank `sum r`. `"linear"`: the same, or peft's sum of the
            factors with `space="factors"`. `"ties"`, `"dare_ties"`, `"dare_linear"` and `"magnitude_prune"` combine
            entry by entry; `"slerp"` interpolates two adapters on an arc; `"orthogonal"` adds to the first adapter what
            the others change outside of its spaces; `"tsv"` joins the first singular triplets of all; `"iso"` makes all
            singular values of the sum equal.
        space: What the methods by entry combine: the `"core"` (default) or `"knots"` matrices of all updates, the
            updates (`"delta"`, which needs a `rank` and a matrix of the size of the weight), or the `"factors"`, as
            peft does, which need equal ranks.
        rank: Rank of the result, which becomes the best approximation; None keeps the rank of the method.
        density: Share of entries to keep, in (0, 1], for the methods by entry.
        sign: `"total"` (default) or `"frequency"`: how `"ties"` and `"dare_ties"` elect the sign of an entry.
        seed: Seed of the entries that DARE drops, with the name of the module; default 0.
        global_angle: Whether `"slerp"` uses one angle, that of all updates together, for every module.
        compress_first: Whether the updates are first projected on the `rank` largest common directions of the core
            space, and then combined; otherwise they are combined and then approximated.
        dtype: Dtype of the new factors: `"float32"` (default), `"bfloat16"`, `"float16"`, or `"adapter"`, the widest of
            the adapters.
        drop: What to leave out: entries of `plain_lora.EXTRAS`, and names of modules or their ends after a dot.

    Raises:
        ValueError: If a field is invalid, or does not fit the method.

    Examples:
        >>> CombineOptions(method="ties", density=0.5).resolved_space
        'core'
    """

    method: CombineMethod = "cat"
    space: Space = "auto"
    rank: int | None = None
    density: float | None = None
    sign: Sign = "total"
    seed: int = 0
    global_angle: bool = False
    compress_first: bool = False
    dtype: str = "float32"
    drop: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(CombineMethod))
        check_choice("space", self.space, get_args(Space))
        check_count("rank", self.rank)
        check_choice("dtype", self.dtype, (*DTYPES, "adapter"))
        names = not isinstance(self.drop, str) and all(isinstance(name, str) for name in self.drop)
        check(names, "drop", self.drop, "use a list of names")
        if self.by_entry:
            if not is_number(self.density):
                raise ValueError(f"density={self.density!r}: method={self.method!r} needs a share in (0, 1].")
            self.entries()  # checks density, sign and seed
        else:
            check(self.density is None, "density", self.density, f"method={self.method!r} keeps all entries: omit it")
        allowed = get_args(Space) if self.by_entry else ("auto", *SPACES.get(self.method, ("delta",)))
        check(self.space in allowed, "space", self.space, f"for method={self.method!r} use {', '.join(allowed)}")
        needs_rank = self.compress_first or (self.by_entry and self.space == "delta") or self.method == "tsv"
        if needs_rank and self.rank is None:
            cause = "compress_first=True" if self.compress_first else f"method={self.method!r}"
            raise ValueError(f"rank=None: {cause} with space={self.resolved_space!r} needs a rank; pass rank=.")
        fits = not self.compress_first or self.resolved_space == "core"
        check(fits, "compress_first", self.compress_first, "it is for space='core'")
        check(not self.global_angle or self.method == "slerp", "global_angle", self.global_angle, "it is for slerp")

    @property
    def by_entry(self) -> bool:
        """Whether the method combines entry by entry."""
        return self.method in get_args(Rule)

    @property
    def resolved_space(self) -> str:
        """The space, with `"auto"` resolved."""
        if self.space != "auto":
            return self.space
        return "core" if self.by_entry else "delta"

    def entries(self, module: str = "") -> Elementwise:
        """Returns the rule of a method by entry for a module; DARE drops other entries of each."""
        return Elementwise(self.method, self.density, self.sign, module_seed(self.seed, module))  # type: ignore[arg-type]

    def dtype_of(self, dtypes: Sequence[torch.dtype]) -> torch.dtype:
        """Returns the dtype of the new factors of a module, from those of the adapters."""
        if self.dtype != "adapter":
            return DTYPES[self.dtype]
        widest = dtypes[0]
        for dtype in dtypes[1:]:
            widest = torch.promote_types(widest, dtype)
        return widest
