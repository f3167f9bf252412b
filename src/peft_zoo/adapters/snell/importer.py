"""Reads adapters trained with the released code of SNELL and SNELLA into the format of `SnellConfig`.

There, the adapter of a linear layer `<site>.<name>` is a module `<site>.additional_<name>.learnable`. It has the
factors `In_Qs` (G, in, r/G) and `Out_Qs` (G, out, r/G), whose names end in `_1` in some models, and for the mixed
kernel `alpha`, `gamma` and `beta` (1,). What share of a matrix is zero stands in no checkpoint: it is an argument of
the script, or for SNELLA in the file of the allocator beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from peft_zoo.kernels.planning.sparsity import kept_count

__all__ = ["import_snell_checkpoint"]

_KEY = re.compile(r"(?P<site>.+)\.additional_(?P<name>[^.]+)\.learnable\.(?P<part>In_Qs|Out_Qs|alpha|gamma|beta)(_1)?")
_MIXED = ("alpha", "gamma", "beta")  # in the order of `zoo_snell_kernel_params`


def import_snell_checkpoint(
    checkpoint: Mapping[str, Tensor],
    sparsity: float | Mapping[str, float],
    rename: Callable[[str], str] = str,
) -> dict[str, Tensor]:
    """Convert the adapters of a released checkpoint; load the result with `peft.set_peft_model_state_dict`.

    Args:
        checkpoint: State dict of the released code's model; tensors that belong to no adapter are passed over.
        sparsity: Share of zeros in [0, 1), one for all matrices or one for each module by its new name. For adapters
            without competition (KLoRA, MixK) give 0 and load with `sparsify="none"`.
        rename: Maps `<site>.<name>`, such as `blocks.0.attn.q`, to the module's path in your model.

    Returns:
        `base_model.model.<module>.zoo_snell_A` (G, in, r/G) and so on for every adapted module.

    Raises:
        ValueError: If the checkpoint has no adapter, one is incomplete, or a module has no sparsity.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in checkpoint.items():
        found = _KEY.fullmatch(key)
        if found:
            modules.setdefault(rename(f"{found['site']}.{found['name']}"), {})[found["part"]] = value
    if not modules:
        raise ValueError(
            "checkpoint: no key like <site>.additional_<name>.learnable.In_Qs; give the model's state dict."
        )
    converted = {}
    for module, parts in modules.items():
        for name, value in _convert(module, parts, sparsity).items():
            converted[f"base_model.model.{module}.zoo_snell_{name}"] = value
    return converted


def _convert(module: str, parts: Mapping[str, Tensor], sparsity: float | Mapping[str, float]) -> dict[str, Tensor]:
    """The tensors of one module by our names."""
    missing = {"In_Qs", "Out_Qs"} - parts.keys() or (parts.keys() & set(_MIXED) and set(_MIXED) - parts.keys())
    if missing:
        raise ValueError(f"checkpoint: the adapter of {module} lacks {sorted(missing)}; the file is incomplete.")
    if isinstance(sparsity, Mapping) and module not in sparsity:
        raise ValueError(f"sparsity has no entry for {module}; give one, or a single number for all.")
    share = sparsity[module] if isinstance(sparsity, Mapping) else sparsity
    A, B = parts["In_Qs"].float(), parts["Out_Qs"].float()
    tensors = {"A": A, "B": B, "num_kept": torch.tensor(kept_count(share, A.shape[1] * B.shape[1]))}
    if "alpha" in parts:
        tensors["kernel_params"] = torch.cat([parts[name].float().view(1) for name in _MIXED])
    return tensors
