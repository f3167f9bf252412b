"""Models whose parameters have a shape but no memory, in which peft injects, loads and merges adapters of any type.

A parameter is a CPU tensor of the full shape with strides of zero over one element. peft sees shapes, dtypes and a
device as if the base model were loaded. To merge, one layer at a time gets its real weight. A few types of adapters
read values of the base while they are injected, see `exportable.DERIVED`; they cannot be merged this way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_zoo.io.checkpoint import Checkpoint
from peft_zoo.merge.base.empty_model import empty_diffusers_model, empty_model


def is_hollow(tensor: Tensor) -> bool:
    """Whether a tensor has a shape but no memory of its own for its elements."""
    return tensor.numel() > 1 and not any(tensor.stride())


def hollow_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a tensor of zeros of the same shape that holds one element; of dtype `dtype`, by default its own."""
    return torch.zeros((), dtype=dtype or tensor.dtype).expand(tensor.shape)


def make_hollow(model: nn.Module, dtype: Callable[[str, Tensor], torch.dtype] | None = None) -> None:
    """Replaces every parameter and buffer of a model, on any device, by one without memory; tied ones stay tied.

    Args:
        model: Model, changed in place.
        dtype: Returns the dtype of a floating-point tensor by its name; the tensor's own by default.
    """
    made: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    full = f"{path}.{name}" if path else name
                    wanted = dtype(full, tensor) if dtype and tensor.is_floating_point() else tensor.dtype
                    new = hollow_like(tensor, wanted)
                    made[id(tensor)] = nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new
                own[name] = made[id(tensor)]


def hollow_copy(model: nn.Module) -> Any:
    """Returns a copy of a model, possibly on the meta device, whose parameters and buffers take no memory."""
    memo: dict[int, Any] = {id(buffer): hollow_like(buffer) for buffer in model.buffers()}
    memo |= {id(parameter): nn.Parameter(hollow_like(parameter), False) for parameter in model.parameters()}
    return copy.deepcopy(model, memo)


def hollow_linears(sizes: Mapping[str, tuple[int, int]]) -> nn.Module:
    """Returns a model of linear layers without memory, from their names and sizes `(out, in)`."""
    model = nn.Module()
    for name, (rows, columns) in sizes.items():
        *parents, last = name.split(".")
        owner = model
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(last, nn.Linear(columns, rows, bias=False, device="meta"))
    make_hollow(model)
    return model


def hollow_model(source: Checkpoint, changes: Mapping[str, Any] | None = None) -> Any:
    """Builds the model of a checkpoint without memory for its parameters.

    Args:
        source: Checkpoint of transformers, or of one model of diffusers.
        changes: New values of fields of its configuration by path, such as `"text_config.vocab_size"`.

    Raises:
        ValueError: If the checkpoint's class is not one of the library, or cannot be built from its configuration.
        NotImplementedError: If it is of diffusers and quantized.
    """
    model = empty_diffusers_model(source) if source.is_diffusers else empty_model(source, changes)
    make_hollow(model)
    return model.eval()


def adapted_layers(model: PeftModel) -> dict[str, BaseTunerLayer]:
    """Returns the adapter layers of a model by the name of the parameter of the base model that each adapts."""
    base: Any = model.get_base_model()
    found: dict[str, BaseTunerLayer] = {}
    for path, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            plain = ".".join(part for part in path.split(".") if part not in _WRAPPERS)
            parameter = getattr(module, "parameter_name", None) or "weight"
            if isinstance(module.get_base_layer(), nn.MultiheadAttention):  # peft merges two matrices of it at once
                raise NotImplementedError(
                    f"{plain}: a LoRA of an nn.MultiheadAttention cannot be merged layer by layer; load the model with "
                    "peft and call merge_and_unload()."
                )
            found.setdefault(f"{plain}.{parameter}" if plain else parameter, module)
    return found


_WRAPPERS = ("base_layer", "modules_to_save", "original_module")


@contextmanager
def real_values(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Gives a module the parameters of `values` in the block, by name; afterwards its own ones are back."""
    before = {name: module._parameters[name] for name in values}
    try:
        for name, value in values.items():
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        module._parameters.update(before)


def merged_values(layer: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merges the active adapters of a layer into real values of its base module, and returns the new ones.

    Args:
        layer: Adapter layer of a hollow model.
        values: All parameters of its base module that merging may change, by name, such as `"weight"` and `"bias"`;
            their memory is used for the result. A quantized base module has its own weight.

    Returns:
        The values after the merge, by the same names.
    """
    base = layer.get_base_layer()
    with (
        real_values(base, {name: value for name, value in values.items() if name in base._parameters}),
        torch.no_grad(),
    ):
        layer.merge()
        after = layer.get_base_layer()
        found = {name: getattr(after, name).data for name in values}
        if after is not base:
            layer.unmerge()
        layer.merged_adapters.clear()
        for name in ("_snapshot", "_bias"):  # copies of weights from before the merge
            if getattr(layer, name, None) is not None:
                setattr(layer, name, None)
    return found
