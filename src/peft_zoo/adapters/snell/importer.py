"""Converts adapters trained with the released code of SNELL and SNELLA to the keys of `SnellConfig`.

In the released code the adapter of a linear layer `<site>.<name>` is a module `<site>.additional_<name>.learnable` with
the factors `In_Qs` (G, in, r/G) and `Out_Qs` (G, out, r/G), whose names end in `_1` in some models, and for the mixed
kernel `alpha`, `gamma` and `beta` (1,). Its checkpoints do not contain the sparsity: it is an argument of the training
script, or for SNELLA in the allocator's file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from peft_zoo.io.safetensors import FLOATS
from peft_zoo.kernels.planning.sparsity import kept_count

_KEY = re.compile(r"(?P<site>.+)\.additional_(?P<name>[^.]+)\.learnable\.(?P<part>In_Qs|Out_Qs|alpha|gamma|beta)(_1)?")
_MIXED = ("alpha", "gamma", "beta")  # in the order of `zoo_snell_kernel_params`


def import_snell_checkpoint(
    checkpoint: Mapping[str, Tensor],
    sparsity: float | Mapping[str, float],
    rename: Callable[[str], str] = str,
) -> dict[str, Tensor]:
    """Converts the adapters of a released checkpoint; load the result with `peft.set_peft_model_state_dict`.

    Args:
        checkpoint: State dict of the released code's model; tensors that belong to no adapter are ignored.
        sparsity: Share of zeros in [0, 1), for all matrices or by new module name. For adapters without sparsity
            (KLoRA, MixK) use 0 and load with `sparsify="none"`.
        rename: Maps `<site>.<name>`, such as `blocks.0.attn.q`, to the name of the module in your model; default: the
            same name.

    Returns:
        State dict with `base_model.model.<module>.zoo_snell_A` (G, in, r/G) and the other tensors of each module.

    Raises:
        ValueError: If the checkpoint has no adapter, an adapter is incomplete, or a module has no sparsity.

    Examples:
        >>> import torch
        >>> part = "blocks.0.attn.additional_q.learnable."
        >>> released = {part + "In_Qs": torch.randn(2, 8, 4), part + "Out_Qs": torch.randn(2, 8, 4)}
        >>> [key.rpartition(".")[2] for key in import_snell_checkpoint(released, sparsity=0.9)]
        ['zoo_snell_A', 'zoo_snell_B', 'zoo_snell_num_kept']
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in checkpoint.items():
        found = _KEY.fullmatch(key)
        if found:
            parts = modules.setdefault(rename(f"{found['site']}.{found['name']}"), {})
            if found["part"] in parts:
                raise ValueError(f"checkpoint: {key} and another key are the same tensor of one module; fix rename.")
            parts[found["part"]] = value
    if not modules:
        raise ValueError(
            "checkpoint: no key like <site>.additional_<name>.learnable.In_Qs; give the state dict of the model."
        )
    return {
        f"base_model.model.{module}.zoo_snell_{name}": value
        for module, parts in modules.items()
        for name, value in _convert(module, parts, sparsity).items()
    }


def _convert(module: str, parts: Mapping[str, Tensor], sparsity: float | Mapping[str, float]) -> dict[str, Tensor]:
    """Returns the tensors of one module by the suffixes of their new keys."""
    missing = {"In_Qs", "Out_Qs"} - parts.keys() or (parts.keys() & set(_MIXED) and set(_MIXED) - parts.keys())
    if missing:
        raise ValueError(f"checkpoint: the adapter of {module} lacks {sorted(missing)}; download the file again.")
    if isinstance(sparsity, Mapping) and module not in sparsity:
        raise ValueError(f"sparsity has no entry for {module}; add one, or give one value for all modules.")
    share = sparsity[module] if isinstance(sparsity, Mapping) else sparsity
    _check_parts(module, parts)
    A, B = parts["In_Qs"].float(), parts["Out_Qs"].float()
    tensors = {"A": A, "B": B, "num_kept": torch.tensor(kept_count(share, A.shape[1] * B.shape[1]))}
    if "alpha" in parts:
        tensors["kernel_params"] = torch.cat([parts[name].float().view(1) for name in _MIXED])
    return tensors


def _check_parts(module: str, parts: Mapping[str, Tensor]) -> None:
    """Raises a ValueError unless the tensors of one module are finite floating-point ones of shapes that fit."""
    for name, value in parts.items():
        if not isinstance(value, Tensor) or value.dtype not in FLOATS or not value.isfinite().all():
            raise ValueError(f"checkpoint: {name} of {module} is not a finite floating-point tensor; get it again.")
    A, B = parts["In_Qs"].shape, parts["Out_Qs"].shape
    if len(A) != 3 or len(B) != 3 or 0 in (*A, *B) or (A[0], A[2]) != (B[0], B[2]):
        raise ValueError(
            f"checkpoint: In_Qs {tuple(A)} and Out_Qs {tuple(B)} of {module} are not (G, in, r/G) and (G, out, r/G); "
            "download the file again."
        )
    for name in _MIXED:
        if name in parts and parts[name].numel() != 1:
            raise ValueError(f"checkpoint: {name} of {module} has {parts[name].numel()} values, not one; get it again.")
