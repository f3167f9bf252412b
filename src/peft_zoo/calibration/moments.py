"""Second moments of what enters adapted modules and of what their adapters add, for compression that knows the data.

Minimising `E|(ΔW − ΔW') x|²` instead of `|ΔW − ΔW'|²` takes `C = E[x xᵀ]` of each module's inputs: the error is
`tr((ΔW − ΔW') C (ΔW − ΔW')ᵀ)`, as in CorDA (arXiv 2406.05223, sec. 3.2). Forward hooks sum x xᵀ while the model runs.

A row x is a token of a linear layer (transformers' `Conv1D` too), a patch of a convolution, its features ordered as in
`weight.flatten(1)`, or a one-hot vector of an embedding; before the adapter's dropout. The adapter's own output is
`ΔW x = s·B·A·x`, so only the (r, r) moment of z = A x is summed, and `E[ΔW x (ΔW x)ᵀ] = s² B E[z zᵀ] Bᵀ` in the end.

Cost per row and module: n multiplications for the diagonal of n inputs, n² for all, n·r for outputs. Memory: float64
sums of 8n or 8n² bytes a module (128 MiB for n = 4096), whatever the number of batches, and 64 MiB or one sample's
patches in float32, which is what rows are multiplied in, whatever the precision of the model or of autocast.

Several processes calibrate each on its own data with its own whole model, without the DDP wrapper; `merge_moments`
joins what they find. Sharded parameters (FSDP, ZeRO-3) are not supported.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftMixedModel, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_zoo.common.modules import evaluation_mode

Kind = Literal["diagonal", "full"]
FIELDS = ("inputs", "outputs")
CHUNK = 2**24  # elements that are widened to float32 at a time


@dataclass(frozen=True, eq=False)
class Moments:
    """What calibration finds for one module; float32.

    Attributes:
        inputs: E[x xᵀ], its diagonal `(in,)` or all of it `(in, in)`; `in` counts in · |kernel| for a convolution. Of
            an embedding always the diagonal, the share of each token: the rest is zero. None if not asked for.
        outputs: E[ΔW x (ΔW x)ᵀ], `(out,)` or `(out, out)`, with the scale and without any `lora_bias`. None likewise.
        count: Rows seen.
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
    """Run a model over batches, in evaluation mode and without gradients, and return its modules' moments.

    A batch is for `model(**batch)` if it is a mapping, `model(*batch)` if a tuple or list, else `model(batch)`, or for
    `forward(model, batch)` if given; it is not moved to the model's device. A mapping's `attention_mask` of two
    dimensions becomes `MomentCollector.mask`. Everything else is as in `collect_moments`, errors included. Afterwards,
    errors included, each module is in the mode in which it was.
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
    """Collect moments while a block of code runs the model in its own way.

    Args:
        model: A `PeftModel`, or a model that peft has put adapters into. Factors should not change meanwhile.
        kind: "diagonal" for the second moment of each feature, "full" for those of all pairs.
        inputs: Whether to collect moments of inputs.
        outputs: Whether to collect moments of a LoRA's own outputs.
        modules: Names of modules to watch, as in the result; None for all that the adapter has.
        adapter_name: The adapter; it must be active, for with other adapters modules see other inputs.
        device: Where sums are kept and results given; None for where each module runs, faster for full moments.

    Yields:
        What fills as the model runs. Its hooks are removed when the block ends, however it ends.

    Raises:
        ValueError: If an argument does not fit the model; as it runs, if a module meets NaN or infinity.
        NotImplementedError: If a module's rows or outputs are not defined here; as it runs, if batches mix adapters.
    """
    if kind not in ("diagonal", "full"):
        raise ValueError(f"kind={kind!r}: use 'diagonal' or 'full'")
    if not (inputs or outputs):
        raise ValueError("inputs=False and outputs=False: there is nothing to collect; set one of them to True")
    layers = _adapted_layers(model, adapter_name, modules)
    sums = [_Sums(name, layer, adapter_name, kind, inputs, outputs, device) for name, layer in layers.items()]
    collector = MomentCollector(sums)
    handles = [each.layer.register_forward_hook(collector._hook(each), with_kwargs=True) for each in sums]
    try:
        yield collector
    finally:
        for handle in handles:
            handle.remove()


class MomentCollector:
    """What `collect_moments` yields.

    Attributes:
        mask: Which tokens of the batches that follow count: (batch, length), zero for padding; None for all of them.
            It applies to rows laid out as (batch, length, …) or (batch · length, …), so not to pooled outputs or a
            decoder (unless it happens to be as long as the encoder), and never to convolutions.
    """

    def __init__(self, sums: list[_Sums]) -> None:
        self._sums = sums
        self.mask: Tensor | None = None

    def moments(self) -> dict[str, Moments]:
        """Moments so far by module's name in the base model; in an adapter file `base_model.model.` stands before it.

        Raises:
            ValueError: If a module has seen no rows.
        """
        return {sums.name: sums.moments() for sums in self._sums}

    def _hook(self, sums: _Sums) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs["x"]
            if kwargs.get("adapter_names") is not None:
                raise NotImplementedError(f"module {sums.name!r}: a batch mixes adapters; run one adapter at a time")
            # Sums made in inference mode could not be added to outside; autocast would multiply in half precision.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                sums.see(x, self.mask)

        return see


@dataclass
class _Sums:
    """Sums over the rows of one module: of x xᵀ, and as "core" of z zᵀ."""

    name: str
    layer: Any
    adapter: str
    kind: Kind
    inputs: bool
    outputs: bool
    device: torch.device | str | None
    count: int = 0
    totals: dict[str, Tensor] = field(default_factory=dict)
    convolution: Any = None

    def __post_init__(self) -> None:
        layer, base, adapter = self.layer, self.layer.get_base_layer(), self.adapter
        refusal = f"module {self.name!r} ({type(base).__name__}) cannot be calibrated; leave it out with modules="
        if hasattr(layer, "parameter_name") or isinstance(base, nn.MultiheadAttention):
            raise NotImplementedError(f"{refusal}: how it multiplies with the adapted parameters is not known here")
        is_lora = isinstance(layer, LoraLayer) and not hasattr(layer, "lora_E")  # AdaLoRA has one more factor
        if self.outputs and (not is_lora or adapter in layer.lora_variant):
            raise NotImplementedError(f"{refusal}: outputs=True needs a plain LoRA, with ΔW = s·B·A (so no DoRA)")
        if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            if base.groups > 1:
                raise NotImplementedError(f"{refusal}: with groups={base.groups}, outputs differ in what they read")
            # What the LoRA itself reads: peft 0.21 gives its convolution neither dilation nor padding mode.
            self.convolution = layer.lora_A[adapter] if is_lora else base

    def see(self, x: Tensor, mask: Tensor | None) -> None:
        """Add the rows of one call."""
        base = self.layer.get_base_layer()
        if isinstance(base, nn.Embedding):  # how often each token occurs says everything
            tokens = _kept(x, mask, x.shape).flatten()
            self.count += len(tokens)
            self._add("inputs", torch.bincount(tokens, minlength=base.num_embeddings))
            return
        sums: dict[str, Any] = {}
        for rows in _linear_rows(x, mask) if self.convolution is None else _patches(x, self.convolution):
            self.count += len(rows)
            if self.inputs:
                moment = rows.square().sum(0) if self.kind == "diagonal" else rows.t() @ rows
                sums["inputs"] = sums.get("inputs", 0) + moment
            if self.outputs:
                z = rows @ self._factors()[0].to(rows).t()
                sums["core"] = sums.get("core", 0) + z.t() @ z
        for key, total in sums.items():
            self._add(key, total)

    def _add(self, key: str, total: Tensor) -> None:
        if not torch.isfinite(total).all():
            what = "inputs" if key == "inputs" else "inputs, or lora_A,"
            raise ValueError(f"module {self.name!r}: its {what} are NaN, infinite or too large to square in float32")
        total = total.to(self.device or total.device)
        if key not in self.totals:
            self.totals[key] = torch.zeros(total.shape, dtype=torch.float64, device=total.device)
        self.totals[key] += total

    def moments(self) -> Moments:
        """The means."""
        if not self.count:
            raise ValueError(f"module {self.name!r} has seen no rows: give data for it, or leave it out with modules=")
        inputs = (self.totals["inputs"] / self.count).float() if self.inputs else None
        return Moments(inputs, self._expanded() if self.outputs else None, self.count)

    def _expanded(self) -> Tensor:
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
        """A `(r, in)` and B `(out, r)`."""
        layer, adapter = self.layer, self.adapter
        if adapter in layer.lora_embedding_A:
            return layer.lora_embedding_A[adapter].detach(), layer.lora_embedding_B[adapter].detach()
        return layer.lora_A[adapter].weight.detach().flatten(1), layer.lora_B[adapter].weight.detach().flatten(1)


def _kept(x: Tensor, mask: Tensor | None, leading: Sequence[int]) -> Tensor:
    """The rows of x that the mask keeps, `leading` being the shape in which they are laid out."""
    if mask is None:
        return x
    if mask.dim() != 2:
        raise ValueError(f"mask has shape {tuple(mask.shape)}: give (batch, length), zero for padding")
    keep = mask.to(x.device) != 0
    if tuple(leading[:2]) == tuple(keep.shape):
        return x[keep]
    return x[keep.flatten()] if tuple(leading) == (keep.numel(),) else x


def _chunks(x: Tensor, per_item: int) -> Iterator[Tensor]:
    """Pieces of x along its first dimension, in float32 at least."""
    for piece in x.split(max(1, CHUNK // per_item)):
        yield piece.to(torch.promote_types(x.dtype, torch.float32))


def _linear_rows(x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    rows = _kept(x, mask, x.shape[:-1])
    return _chunks(rows.reshape(-1, rows.shape[-1]), rows.shape[-1])


def _patches(x: Tensor, convolution: Any) -> Iterator[Tensor]:
    """Inputs `(batch, in, *size)` or `(in, *size)` as rows `(some, in · |kernel|)`, one for each output position."""
    kernel, strides, dilations = convolution.kernel_size, convolution.stride, convolution.dilation
    x = x if x.dim() == len(kernel) + 2 else x.unsqueeze(0)
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    for piece in _chunks(x, math.prod(x.shape[1:]) * math.prod(kernel) // math.prod(strides) + 1):
        windows = F.pad(piece, convolution._reversed_padding_repeated_twice, mode)
        for axis, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True), start=2):
            windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        yield windows.movedim(1, len(kernel) + 1).flatten(0, len(kernel)).flatten(1)


def _adapted_layers(model: nn.Module, adapter: str, modules: Collection[str] | None) -> dict[str, Any]:
    """The layers that have the adapter, by name in the base model; only those in `modules` if given."""
    root = model.base_model if isinstance(model, (PeftModel, PeftMixedModel)) else model
    root = root.model if isinstance(root, BaseTuner) else root
    if any(isinstance(module, (PeftModel, PeftMixedModel, BaseTuner)) for module in root.modules()):
        raise ValueError(f"model is a {type(model).__name__} around an adapted model: give the adapted model itself")
    found = [(name, layer) for name, layer in root.named_modules() if isinstance(layer, BaseTunerLayer)]
    found = [(name, layer) for name, layer in found if not isinstance(layer, TrainableTokensLayer)]  # has no rows
    layers: dict[str, Any] = {name: layer for name, layer in found if adapter in layer._get_available_adapters()}
    if not layers:
        available = sorted({name for _, layer in found for name in layer._get_available_adapters()})
        raise ValueError(f"adapter_name={adapter!r} adapts no module of the model; available: {available}")
    if modules is not None:
        if isinstance(modules, str) or not modules:
            raise ValueError(f"modules={modules!r}: give a list of names of modules, or None for all")
        for name in modules:
            if name not in layers:
                near = difflib.get_close_matches(name, layers, cutoff=0)
                raise ValueError(f"modules: {name!r} is none of the {len(layers)} adapted modules; nearest: {near}")
        layers = {name: layer for name, layer in layers.items() if name in modules}
    for name, layer in layers.items():
        if adapter not in layer.active_adapters or layer.disable_adapters:
            raise ValueError(f"adapter_name={adapter!r} is not active in module {name!r}; enable it with set_adapter")
    return layers


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def merge_moments(parts: Sequence[Mapping[str, Moments]]) -> dict[str, Moments]:
    """Join what several processes or runs found: for each module the mean weighted by rows, and the sum of rows.

    Args:
        parts: What each found, as from `torch.distributed.all_gather_object`. A module that only some of them have is
            taken from those.

    Raises:
        ValueError: If there are no parts, or two of them disagree about what a module has or about a shape.
    """
    if not parts:
        raise ValueError("parts is empty: give the moments of at least one process")
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _mean(name, [part[name] for part in parts if name in part]) for name in names}


def _mean(name: str, found: list[Moments]) -> Moments:
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


def save_moments(path: str | os.PathLike[str], moments: Mapping[str, Moments]) -> None:
    """Write moments to one safetensors file, in one step: a reader finds the old file or the new one.

    Tensors are named `<module>.inputs` and `<module>.outputs`; `counts` in the metadata is JSON, rows by module.
    """
    found = {f"{name}.{which}": getattr(moments[name], which) for name in moments for which in FIELDS}
    tensors = {key: tensor.contiguous() for key, tensor in found.items() if tensor is not None}
    counts = json.dumps({name: value.count for name, value in moments.items()})
    with tempfile.TemporaryDirectory(prefix=".moments-", dir=Path(path).parent) as folder:
        save_file(tensors, Path(folder) / "moments", metadata={"counts": counts})
        os.replace(Path(folder) / "moments", path)


def load_moments(path: str | os.PathLike[str]) -> dict[str, Moments]:
    """Read what `save_moments` wrote, on the CPU.

    Raises:
        ValueError: If the file is something else.
    """
    try:
        with safe_open(os.fspath(path), "pt") as file:
            listed = json.loads((file.metadata() or {})["counts"])
            counts: dict[str, int] = {name: int(count) for name, count in listed.items()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)} was not written by save_moments: {error!r}") from error
    for key, tensor in tensors.items():
        name, _, which = key.rpartition(".")
        square = tensor.dim() in (1, 2) and len(set(tensor.shape)) == 1
        if name not in counts or which not in FIELDS or tensor.dtype != torch.float32 or not square:
            shape = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{os.fspath(path)}: {key!r} is {shape}, not float32 (n,) or (n, n) of a counted module")
    get = tensors.get
    return {name: Moments(get(f"{name}.inputs"), get(f"{name}.outputs"), count) for name, count in counts.items()}
