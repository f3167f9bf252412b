"""Second moments of the inputs of adapted modules and of their adapters' outputs, for data-aware compression.

Minimising `E|(ΔW − ΔW') x|²` instead of `|ΔW − ΔW'|²` takes `C = E[x xᵀ]` of each module's inputs: the error is
`tr((ΔW − ΔW') C (ΔW − ΔW')ᵀ)`, as in CorDA (arXiv 2406.05223, sec. 3.2). Forward hooks sum x xᵀ while the model runs.

A row x is a token of a linear layer (transformers' `Conv1D` too), a patch of a convolution, its features ordered as in
`weight.flatten(1)`, or a one-hot vector of an embedding; before the adapter's dropout. The adapter's own output is
`ΔW x = s·B·A·x`, so only the (r, r) moment of z = A x is summed, and `E[ΔW x (ΔW x)ᵀ] = s² B E[z zᵀ] Bᵀ` in the end.

Cost per row and module: n multiplications for the diagonal of n inputs, n² for all, n·r for outputs. Memory: float64
sums of 8n or 8n² bytes per module (128 MiB for n = 4096), whatever the number of batches, and 64 MiB or one sample's
patches in float32, the precision of the products whatever the dtype of the model or of autocast.

Several processes calibrate each on its own data with its own whole model, without the DDP wrapper; `merge_moments`
joins their results. Sharded parameters (FSDP, ZeRO-3) are not supported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_zoo.calibration.collector import Hook, Sums, adapted_layers, forward_hooks, full_precision
from peft_zoo.calibration.rows import convolution_patches, linear_rows, select_rows
from peft_zoo.common.atomic import replaced_file
from peft_zoo.common.checks import check
from peft_zoo.common.modules import evaluation_mode
from peft_zoo.io.safetensors import TensorFile
from peft_zoo.io.strict_json import parse_json

Kind = Literal["diagonal", "full"]
FIELDS = ("inputs", "outputs")


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of one module, in float32, as `calibrate` returns them.

    Attributes:
        inputs: E[x xᵀ]: its diagonal `(in,)`, or the whole matrix `(in, in)`; `in` is in · |kernel| for a convolution.
            For an embedding always the diagonal, the share of each token: the rest is zero. None if not requested.
        outputs: E[ΔW x (ΔW x)ᵀ], `(out,)` or `(out, out)`, including the scale but not `lora_bias`. None if not
            requested.
        count: Number of rows seen.

    Examples:
        >>> Moments(torch.ones(4), None, count=10).inputs.shape
        torch.Size([4])
    """

    inputs: Tensor | None
    outputs: Tensor | None
    count: int


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    kind: Kind = "diagonal",
    inputs: bool = True,
    outputs: bool = False,
    modules: Collection[str] | None = None,
    adapter_name: str = "default",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    device: torch.device | str | None = "cpu",
) -> dict[str, Moments]:
    """Runs a model over batches, in evaluation mode and without gradients, and returns moments by module name.

    Args:
        model: A `PeftModel`, or a model that peft has injected adapters into. Modules get their modes back, also when
            an error is raised.
        batches: Each is passed as `model(**batch)` if it is a mapping, `model(*batch)` if a tuple or list, else
            `model(batch)`. Batches are not moved to the model's device. A mapping's two-dimensional `attention_mask`
            becomes `MomentCollector.mask`.
        kind: This and the following arguments, and errors, are those of `collect_moments`.
        inputs: Whether to collect moments of inputs.
        outputs: Whether to collect moments of a LoRA's own outputs.
        modules: Names of modules to collect from; None for all.
        adapter_name: Name of the adapter.
        forward: Function `(model, batch)` that runs the model instead.
        device: Device of the sums and results.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_zoo import calibrate
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> found = calibrate(model, [torch.ones(5, 4)])
        >>> found["0"].count, found["0"].inputs
        (5, tensor([1., 1., 1., 1.]))
    """
    options: dict[str, Any] = {"kind": kind, "inputs": inputs, "outputs": outputs, "modules": modules}
    with (
        collect_moments(model, **options, adapter_name=adapter_name, device=device) as collector,
        evaluation_mode(model),
        torch.no_grad(),
    ):
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            collector.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
            (forward or _forward)(model, batch)
    return collector.moments()


@contextmanager
def collect_moments(
    model: nn.Module,
    *,
    kind: Kind = "diagonal",
    inputs: bool = True,
    outputs: bool = False,
    modules: Collection[str] | None = None,
    adapter_name: str = "default",
    device: torch.device | str | None = "cpu",
) -> Iterator[MomentCollector]:
    """Collects moments while a block of code runs the model.

    Args:
        model: A `PeftModel`, or a model that peft has injected adapters into. The factors must not change meanwhile.
        kind: `"diagonal"` for the second moment of each feature, `"full"` for those of all pairs of features.
        inputs: Whether to collect moments of inputs.
        outputs: Whether to collect moments of a LoRA's own outputs.
        modules: Names of modules to collect from, as in the result; None for all modules that have the adapter.
        adapter_name: The adapter; it must be active, since modules see other inputs with other adapters.
        device: Device of the sums and results; None for the device of each module, faster for full moments.

    Yields:
        A collector whose `moments()` gives the result. Its hooks are removed when the block ends or raises.

    Raises:
        ValueError: If an argument does not fit the model; in the block, if a module's inputs are not finite.
        NotImplementedError: If a module's rows or outputs are not defined here; in the block, if a batch mixes
            adapters.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> with collect_moments(model, kind="full") as collector:
        ...     _ = model(torch.ones(5, 4))
        >>> collector.moments()["0"].inputs.shape
        torch.Size([4, 4])
    """
    if kind not in ("diagonal", "full"):
        raise ValueError(f"kind={kind!r}: use 'diagonal' or 'full'")
    if not (inputs or outputs):
        raise ValueError("inputs=False and outputs=False: there is nothing to collect; set one of them to True")
    layers = adapted_layers(model, adapter_name, modules)
    sums = [_LayerMoments(name, layer, adapter_name, kind, inputs, outputs, device) for name, layer in layers.items()]
    collector = MomentCollector(sums)
    with forward_hooks((each.layer, collector._hook(each)) for each in sums):
        yield collector


class MomentCollector:
    """Collector of moments that `collect_moments` yields.

    Attributes:
        mask: Mask of the following batches, `(batch, length)`, zero for tokens to ignore; None uses all tokens.
            It applies to rows laid out as (batch, length, …) or (batch · length, …), so not to pooled outputs or a
            decoder (unless it happens to be as long as the encoder), and never to convolutions.
    """

    def __init__(self, sums: list[_LayerMoments]) -> None:
        self._sums = sums
        self.mask: Tensor | None = None

    def moments(self) -> dict[str, Moments]:
        """Returns moments by module name in the base model; adapter files put `base_model.model.` before it.

        Raises:
            ValueError: If a module has seen no rows.
        """
        return {sums.name: sums.moments() for sums in self._sums}

    def _hook(self, sums: _LayerMoments) -> Hook:
        """Returns a forward hook that adds the rows of a batch to `sums`; refuses batches that mix adapters."""

        def add_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs["x"]
            if kwargs.get("adapter_names") is not None:
                raise NotImplementedError(f"module {sums.name!r}: a batch mixes adapters; run one adapter at a time")
            with full_precision(x.device.type):
                sums.add_rows(x, self.mask)

        return add_rows


class _LayerMoments(Sums):
    """Sums over the input rows x of an adapted layer: "inputs", x xᵀ or its diagonal, and "core", z zᵀ for z = A x."""

    def __init__(
        self,
        name: str,
        layer: Any,
        adapter: str,
        kind: Kind,
        inputs: bool,
        outputs: bool,
        device: torch.device | str | None,
    ) -> None:
        super().__init__(name, device)
        self.layer, self.adapter, self.kind, self.inputs, self.outputs = layer, adapter, kind, inputs, outputs
        self.convolution: Any = None
        base = layer.get_base_layer()
        refusal = f"module {name!r} ({type(base).__name__}) cannot be calibrated; leave it out with modules="
        if hasattr(layer, "parameter_name") or isinstance(base, nn.MultiheadAttention):
            raise NotImplementedError(f"{refusal}: its inputs are not rows that one weight matrix multiplies")
        is_lora = isinstance(layer, LoraLayer) and not hasattr(layer, "lora_E")  # AdaLoRA has one more factor
        if outputs and (not is_lora or adapter in layer.lora_variant):
            raise NotImplementedError(f"{refusal}: outputs=True needs a plain LoRA, with ΔW = s·B·A (so no DoRA)")
        if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            if base.groups > 1:
                raise NotImplementedError(f"{refusal}: groups={base.groups} is not supported, only groups=1")
            # The patches that the LoRA reads: peft 0.21 gives its convolution neither dilation nor padding mode.
            self.convolution = layer.lora_A[adapter] if is_lora else base

    def add_rows(self, x: Tensor, mask: Tensor | None) -> None:
        """Adds the rows of one call of the layer."""
        base = self.layer.get_base_layer()
        if isinstance(base, nn.Embedding):  # the moment of one-hot vectors is how often each token occurs
            tokens = select_rows(x, mask, x.shape).flatten()
            self.count += len(tokens)
            self.add("inputs", torch.bincount(tokens, minlength=base.num_embeddings))
            return
        sums: dict[str, Any] = {}
        for rows in linear_rows(x, mask) if self.convolution is None else convolution_patches(x, self.convolution):
            self.count += len(rows)
            if self.inputs:
                moment = rows.square().sum(0) if self.kind == "diagonal" else rows.t() @ rows
                sums["inputs"] = sums.get("inputs", 0) + moment
            if self.outputs:
                z = rows @ self._factors()[0].to(rows).t()
                sums["core"] = sums.get("core", 0) + z.t() @ z
        for key, total in sums.items():
            self.add(key, total, "inputs" if key == "inputs" else "inputs, or lora_A,")

    def moments(self) -> Moments:
        """Returns the means over all rows."""
        if not self.count:
            raise ValueError(f"module {self.name!r} has seen no rows: give data for it, or leave it out with modules=")
        inputs = (self.totals["inputs"] / self.count).float() if self.inputs else None
        return Moments(inputs, self._output_moment() if self.outputs else None, self.count)

    def _output_moment(self) -> Tensor:
        """Returns s² B E[z zᵀ] Bᵀ or its diagonal."""
        (A, B), scale = self._factors(), self.layer.scaling[self.adapter]
        if (core := self.totals.get("core")) is None:  # an embedding
            occurrences = self.totals["inputs"]
            A = A.to(occurrences.device).double()
            core = (A * occurrences) @ A.t()
            scale *= float(getattr(self.layer.get_base_layer(), "embed_scale", 1.0))  # Gemma's scale their rows
        B = scale * B.to(core.device).double()
        half = B @ (core / self.count)
        # Rounding must not make a square negative.
        return ((half * B).sum(1).clamp_min(0) if self.kind == "diagonal" else half @ B.t()).float()

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Returns A `(r, in)` and B `(out, r)`."""
        layer, adapter = self.layer, self.adapter
        if adapter in layer.lora_embedding_A:
            return layer.lora_embedding_A[adapter].detach(), layer.lora_embedding_B[adapter].detach()
        return layer.lora_A[adapter].weight.detach().flatten(1), layer.lora_B[adapter].weight.detach().flatten(1)


def _forward(model: nn.Module, batch: Any) -> Any:
    """Runs a model on one batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def merge_moments(parts: Sequence[Mapping[str, Moments]]) -> dict[str, Moments]:
    """Merges the moments of several processes or runs: means weighted by row count.

    Args:
        parts: Moments of each process, such as from `torch.distributed.all_gather_object`. A module may be missing
            from some of them.

    Raises:
        ValueError: If there are no parts, or two of them differ in a module's fields or shapes.

    Examples:
        >>> one, two = Moments(torch.ones(2), None, 1), Moments(torch.zeros(2), None, 3)
        >>> merge_moments([{"0": one}, {"0": two}])["0"].inputs
        tensor([0.2500, 0.2500])
    """
    if not parts:
        raise ValueError("parts is empty: give the moments of at least one process")
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _mean(name, [part[name] for part in parts if name in part]) for name in names}


def _mean(name: str, found: list[Moments]) -> Moments:
    """Merges the moments of one module."""
    count = sum(moments.count for moments in found)

    def mean(which: str) -> Tensor | None:
        tensors: list[Any] = [getattr(moments, which) for moments in found]
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in tensors]
        if len(set(shapes)) > 1:
            raise ValueError(f"module {name!r}: {which} differ in shape between parts, {shapes}; calibrate all alike")
        if shapes[0] is None:
            return None
        weighted = (m.count / count * tensor.cpu().double() for m, tensor in zip(found, tensors, strict=True))
        return torch.as_tensor(sum(weighted)).float()

    return Moments(mean("inputs"), mean("outputs"), count)


def input_moment(moments: Mapping[str, Tensor | Moments], name: str) -> Tensor:
    """Returns the second moment of a module's inputs, or raises a ValueError that names the module without one."""
    found = moments.get(name)
    found = found.inputs if isinstance(found, Moments) else found
    if found is None:
        raise ValueError(f"moments has no inputs of module {name}; calibrate all modules of the adapter.")
    return found


def save_moments(path: str | os.PathLike[str], moments: Mapping[str, Moments]) -> None:
    """Writes moments to one safetensors file, atomically.

    Args:
        path: The file; an existing one is replaced.
        moments: Moments by module name. Tensors are named `<module>.inputs` and `<module>.outputs`; the entry `counts`
            of the metadata is JSON with the number of rows by module.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_moments(f"{folder}/moments.safetensors", {"0": Moments(torch.ones(4), None, 10)})
        ...     load_moments(f"{folder}/moments.safetensors")["0"].count
        10
    """
    found = {f"{name}.{which}": getattr(moments[name], which) for name in moments for which in FIELDS}
    tensors = {key: tensor.contiguous() for key, tensor in found.items() if tensor is not None}
    counts = json.dumps({name: value.count for name, value in moments.items()})
    with replaced_file(Path(path)) as draft:
        save_file(tensors, draft, metadata={"counts": counts})


def load_moments(path: str | os.PathLike[str]) -> dict[str, Moments]:
    """Reads a file of `save_moments`, onto the CPU.

    Args:
        path: The file.

    Raises:
        ValueError: If the file was not written by `save_moments`, or has values that moments cannot have.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_moments(f"{folder}/moments.safetensors", {"0": Moments(torch.ones(4), None, 10)})
        ...     load_moments(f"{folder}/moments.safetensors")["0"].inputs
        tensor([1., 1., 1., 1.])
    """
    try:
        with TensorFile(Path(path)) as file:
            counts: dict[str, int] = parse_json(file.metadata.get("counts", "").encode())
            tensors = {key: file.read_finite(key) for key in file.tensors}
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} was not written by save_moments: {error}") from error
    for name, count in counts.items():
        check(type(count) is int and count >= 0, f"{os.fspath(path)}: count of {name}", count, "save a number of rows")
    for key, tensor in tensors.items():
        name, _, which = key.rpartition(".")
        square = tensor.dim() in (1, 2) and len(set(tensor.shape)) == 1
        if name not in counts or which not in FIELDS or tensor.dtype != torch.float32 or not square:
            shape = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{os.fspath(path)}: {key!r} is {shape}; save float32 (n,) or (n, n) and the row count")
        if ((tensor if tensor.dim() == 1 else tensor.diagonal()) < 0).any():
            raise ValueError(f"{os.fspath(path)}: {key!r} has negative mean squares; calibrate again.")
    get = tensors.get
    return {name: Moments(get(f"{name}.inputs"), get(f"{name}.outputs"), count) for name, count in counts.items()}
