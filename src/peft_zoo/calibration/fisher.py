r"""How much each number of a weight matters, from data, for LQ-LoRA to lose the least where it counts.

An error E in a matrix W raises the loss by about `sum F_ij E_ij^2 / 2`, with the diagonal of the Fisher information::

    F_ij = sum_n (dL_n / dW_ij)^2  ~  row_i column_j / mean      row_i = mean_j F_ij,  column_j = mean_i F_ij

over sequences n. Only the means are summed up: `out + in` numbers a matrix, where all of F would be as large as the
model in float32. Instead of F the second moment of what a layer reads can be taken, `F_ij = E[x_j^2]`, which needs no
backward pass: then `sum F_ij E_ij^2` is the error of the layer's output, if features are uncorrelated.

Source: LQ-LoRA (arXiv 2311.12023), section 3.4, whose factorization uses these means too, and eq. 6.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from peft_zoo.adapters.lq_lora.config import LqLoraConfig
from peft_zoo.adapters.lq_lora.nf_linear import oriented
from peft_zoo.adapters.lq_lora.targets import named, targets
from peft_zoo.common.modules import frozen
from peft_zoo.kernels.low_rank.quantized import Diagonals

__all__ = ["Weights", "load_weights", "preprocess_lq_lora", "save_weights"]

ATTRIBUTE = "_lq_lora_weights"
"""Of a module, while it waits to be quantized."""

ROW, COLUMN, BOTH = (True, False), (False, True), (True, True)
HEURISTICS = {"two-sided": [BOTH], "row": [ROW], "col": [COLUMN], "auto": [BOTH, ROW, COLUMN]}
"""Whether rows and columns are weighted in the SVD; all that are tried."""

LEAST = 1e-6
"""Share of the average F that is added to all of it."""

Loss = Callable[[nn.Module, Any], Tensor]


class Weights(NamedTuple):
    """How much errors in a matrix matter.

    Attributes:
        row: Mean of F over each row, float32 `(out,)`.
        column: Mean of F over each column, float32 `(in,)`.
    """

    row: Tensor
    column: Tensor

    def diagonals(self, eps: float) -> tuple[Tensor, Tensor]:
        """D_row and D_col, such that the norm `|D_row E D_col|^2` is `sum F_ij E_ij^2`.

        Args:
            eps: No entry is below this share of the largest.
        """
        mean = self.row.mean()
        row, column = (self.row / mean).sqrt(), self.column.sqrt()
        return row.clamp(min=eps * row.max()), column.clamp(min=eps * column.max())


def preprocess_lq_lora(
    model: nn.Module, config: LqLoraConfig, data: Iterable[Any] | Mapping[str, Weights], loss_fn: Loss | None = None
) -> dict[str, Weights]:
    """Weigh the matrices that `get_peft_model(model, config)` is going to quantize.

    Args:
        model: The base model, in floating-point. It is run in evaluation mode and left as it was, but for an attribute
            of each targeted layer that holds its weights until it is quantized.
        config: With `weighting="fisher"` or `"activation"`.
        data: Batches: mappings for `model(**batch)`, or whatever `loss_fn` takes. Each sample is a sequence n; in
            batches of several, sequences should have equal lengths, for the loss is a mean over all of their tokens,
            and padding counts as input. 128 to 256 sequences are usual. Or what an earlier call returned.
        loss_fn: L of a batch. By default the model's own; the labels of a batch that has none are its `input_ids`.

    Returns:
        The weights by module. With several processes (`torch.distributed`) all get those of all data.

    Raises:
        ValueError: If there is nothing to weigh or no data, or the data gives no loss or values that are not finite.
    """
    if config.weighting == "none":
        raise ValueError("LqLoraConfig: weighting='none' uses no data; set it to 'fisher' or 'activation'.")
    layers = dict(targets(named(config, model), model, check_target_module_exists))
    if not layers:
        raise ValueError(f"target_modules={config.target_modules!r} names no layer of the model that is quantized.")
    if isinstance(data, Mapping):
        weights = dict(data)
    else:
        weights = _collect(model, layers, config.weighting, data, loss_fn or _own_loss)
    for name, layer in layers.items():
        rows, columns = oriented(layer).shape
        found = weights.get(name)
        if found is None or found.row.shape != (rows,) or found.column.shape != (columns,):
            raise ValueError(f"data: weights of {name} are missing or not of the shapes ({rows},) and ({columns},).")
    for name, layer in layers.items():
        setattr(layer, ATTRIBUTE, weights[name])
    return weights


def uses(config: LqLoraConfig, name: str, layer: Any) -> tuple[list[Diagonals], Diagonals | None]:
    """The weights to try for the SVD of a matrix, and those to measure by.

    Raises:
        ValueError: If the configuration wants weights and `preprocess_lq_lora` has not been called.
    """
    if config.weighting == "none":
        return [(None, None)], None
    weights = getattr(layer, ATTRIBUTE, None)
    if weights is None:
        raise ValueError(
            f"LqLoraConfig: weighting={config.weighting!r} needs data, and {name} has not been weighed; call "
            "preprocess_lq_lora(model, config, data) before get_peft_model."
        )
    row, column = weights.diagonals(config.weighting_eps)
    choices = HEURISTICS[config.heuristic]
    return [(row if by_row else None, column if by_column else None) for by_row, by_column in choices], (row, column)


def save_weights(path: str | os.PathLike[str], weights: Mapping[str, Weights]) -> None:
    """Write weights to one safetensors file, as `<module>.row` and `<module>.column`."""
    parts = {f"{name}.{part}": tensor for name, both in weights.items() for part, tensor in both._asdict().items()}
    save_file({key: tensor.contiguous() for key, tensor in parts.items()}, path)


def load_weights(path: str | os.PathLike[str]) -> dict[str, Weights]:
    """Read what `save_weights` wrote.

    Raises:
        ValueError: If the file is something else.
    """
    try:
        parts = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} was not written by save_weights: {error}") from error
    names = {key.rpartition(".")[0]: None for key in parts}
    if parts.keys() != {f"{name}.{part}" for name in names for part in Weights._fields} or not parts:
        raise ValueError(f"{os.fspath(path)} was not written by save_weights: it needs a row and a column by module.")
    return {name: Weights(*(parts[f"{name}.{part}"] for part in Weights._fields)) for name in names}


# ---- running the model ----


def _collect(
    model: nn.Module, layers: Mapping[str, Any], kind: str, data: Iterable[Any], loss_fn: Loss
) -> dict[str, Weights]:
    sums = {name: _Sums(oriented(layer)) for name, layer in layers.items()}
    fisher = kind == "fisher"
    hooks = {name: one.read_gradient if fisher else one.read_input for name, one in sums.items()}
    handles = [layer.register_forward_hook(hooks[name]) for name, layer in layers.items()]
    batches = 0
    try:
        with frozen(model), torch.set_grad_enabled(fisher):
            for batch in data:
                loss = loss_fn(model, batch)
                if not torch.isfinite(loss).all():
                    raise ValueError(f"data: the loss of batch {batches} is {loss.item()}; it has to be finite.")
                if loss.requires_grad:
                    loss.backward()
                batches += 1
    finally:
        for handle in handles:
            handle.remove()
    if not batches:
        raise ValueError("data is empty; give at least one batch.")
    return _finished(sums)


class _Sums:
    """Sums of squares of one matrix' gradients over sequences, along its rows and along its columns."""

    def __init__(self, weight: Tensor) -> None:
        rows, columns = weight.shape
        self.row = torch.zeros(rows, dtype=torch.float64, device=weight.device)
        self.column = torch.zeros(columns, dtype=torch.float64, device=weight.device)

    def read_gradient(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """A forward hook: what enters now meets the gradient of what comes out when that is known."""
        x = args[0].detach()
        if not output.requires_grad:  # here the graph begins; a copy, for a leaf could not be changed in place
            output = output.detach().requires_grad_().clone()
        output.register_hook(lambda gradient: self.add(x, gradient))
        return output

    @torch.no_grad()
    def add(self, x: Tensor, dy: Tensor) -> None:
        """Add the gradients of the sequences in x `(n, ..., in)` and dy `(n, ..., out)`, whose loss is a mean over n.

        Without dimensions between, each row is a sequence of its own.
        """
        count = len(dy)
        for one, gradient in zip(x.float(), dy.float() * count, strict=True):
            squares = (gradient.reshape(-1, len(self.row)).mT @ one.reshape(-1, len(self.column))).square()
            self.row += squares.mean(1)
            self.column += squares.mean(0)

    def read_input(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook: adds the squares of what enters, for columns; all rows read the same."""
        with torch.autocast(args[0].device.type, enabled=False):
            squares = args[0].detach().double().square().flatten(0, -2)
        self.column += squares.sum(0)
        self.row += squares.sum() / squares.shape[1]


def _finished(sums: Mapping[str, _Sums]) -> dict[str, Weights]:
    """The sums of all processes, without zeros: a matrix that met no data counts as one that met very little."""
    if distributed.is_available() and distributed.is_initialized():
        for one in sums.values():
            distributed.all_reduce(one.row)
            distributed.all_reduce(one.column)
    total = sum(one.row.mean().item() for one in sums.values()) / len(sums)
    for name, one in sums.items():
        if not (torch.isfinite(one.row).all() and torch.isfinite(one.column).all()):
            raise ValueError(f"data: gradients or inputs of {name} are not finite.")
    if total == 0:
        raise ValueError("data: no matrix that is to be weighed had a gradient or an input other than zero.")
    least = LEAST * total
    parts = ((name, (one.row + least) / total, (one.column + least) / total) for name, one in sums.items())
    return {name: Weights(row.float(), column.float()) for name, row, column in parts}


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    """What the model says that its loss is.

    Raises:
        ValueError: If it says none.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"data: a batch is a {type(batch).__name__}; give mappings for model(**batch), or loss_fn.")
    labels = {}
    if "labels" not in batch and "input_ids" in batch:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        labels["labels"] = ids if mask is None else ids.masked_fill(mask == 0, -100)
    loss = getattr(model(**batch, **labels), "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError("data: the model gives no loss for a batch; put labels into it, or give loss_fn.")
    return loss
