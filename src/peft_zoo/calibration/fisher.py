r"""Estimates from data how much an error of each weight of a linear layer matters.

An error E in a matrix W raises the loss by about `sum F_ij E_ij^2 / 2`, with the diagonal of the Fisher information::

    F_ij = sum_n (dL_n / dW_ij)^2  ~  row_i column_j / mean      row_i = mean_j F_ij,  column_j = mean_i F_ij

over sequences n. Only the means are summed: `out + in` values for a matrix, where all of F would be as large as the
model in float32. The second moment of a layer's input can be used instead of F, `F_ij = E[x_j^2]`, which needs no
backward pass: then `sum F_ij E_ij^2` is the error of the layer's output, if features are uncorrelated.

Source: LQ-LoRA (arXiv 2311.12023), section 3.4, whose factorization uses these means too, and eq. 6.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from peft_zoo.calibration.collector import Hook, Sums, forward_hooks, full_precision
from peft_zoo.calibration.rows import linear_rows, matrix_shape
from peft_zoo.common.atomic import replaced_file
from peft_zoo.common.modules import frozen
from peft_zoo.io import TensorFile
from peft_zoo.io.safetensors import FLOATS

LEAST = 1e-6
"""Share of the average importance that is added to every entry."""

Kind = Literal["fisher", "activation"]
Loss = Callable[[nn.Module, Any], Tensor]


class ImportanceWeights(NamedTuple):
    """Importance of the weights of one matrix: how much an error in each row and column matters.

    Attributes:
        row: Mean of F over each row, float32 `(out,)`.
        column: Mean of F over each column, float32 `(in,)`.

    Examples:
        >>> row, column = ImportanceWeights(torch.ones(3), torch.ones(4)).diagonals(eps=1e-6)
        >>> row.shape, column.shape
        (torch.Size([3]), torch.Size([4]))
    """

    row: Tensor
    column: Tensor

    def diagonals(self, eps: float) -> tuple[Tensor, Tensor]:
        """Returns D_row `(out,)` and D_col `(in,)` such that `|D_row E D_col|^2` is `sum F_ij E_ij^2`.

        Args:
            eps: Smallest entry as a share of the largest.
        """
        mean = self.row.mean()
        row, column = (self.row / mean).sqrt(), self.column.sqrt()
        return row.clamp(min=eps * row.max()), column.clamp(min=eps * column.max())


def estimate_importance(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    kind: Kind,
    batches: Iterable[Any],
    loss_fn: Loss | None = None,
) -> dict[str, ImportanceWeights]:
    """Runs a model over batches and returns the importance of the weights of linear layers by name, 1 on average.

    The model has floating-point weights; it runs in evaluation mode and is left unchanged. `kind` is `"fisher"` for
    squared gradients, `"activation"` for second moments of the inputs. Batches are mappings for `model(**batch)`, or
    arguments of `loss_fn(model, batch)`; without labels, `input_ids` are the labels. Each sample is a sequence n;
    sequences of a batch should have equal lengths, because the loss is a mean over all of their tokens, and padding
    counts as input. With several processes (`torch.distributed`) the result is that of all their data.

    Raises:
        ValueError: If there is no data, a loss or statistic is not finite, or the rows that a layer sees cannot be
            assigned to the sequences of a batch, as in experts that see some tokens: one sequence per batch always can.
    """
    sums = {name: Sums(name, layer.weight.device) for name, layer in layers.items()}  # type: ignore[arg-type]
    loss_fn, count, sequences = loss_fn or _own_loss, 0, _Sequences()
    hooks = (
        (layer, _gradient_hook(sums[name], sequences) if kind == "fisher" else _input_hook(sums[name]))
        for name, layer in layers.items()
    )
    with frozen(model), torch.set_grad_enabled(kind == "fisher"), forward_hooks(hooks):
        for batch in batches:
            sequences.count(batch)
            loss = loss_fn(model, batch)
            if not torch.isfinite(loss).all():
                raise ValueError(f"data: the loss of batch {count} is {loss.item()}; use data with a finite loss.")
            if loss.requires_grad:
                loss.backward()
            count += 1
    if not count:
        raise ValueError("data is empty; give at least one batch.")
    return _normalized({name: _means(sums[name], matrix_shape(layer)) for name, layer in layers.items()})


class _Sequences:
    """Sequences of the present batch: assigns the rows that a layer sees to them."""

    def count(self, batch: Any) -> None:
        """Sets the number of sequences and their lengths from the tensors of a batch."""
        values = [batch] if isinstance(batch, Tensor) else batch.values() if isinstance(batch, Mapping) else batch
        values = values if isinstance(values, Iterable) else ()
        tensors = [value for value in values if isinstance(value, Tensor) and value.dim() > 0]
        tokens = [value for value in tensors if value.dim() == 2 and not value.is_floating_point()]
        self.number = len((tokens or tensors)[0]) if tensors else None
        self.lengths = {1} | {ids.shape[1] for ids in tokens if len(ids) == self.number}
        self.has_tokens = bool(tokens)

    def split(self, x: Tensor, name: str) -> Tensor:
        """Returns x `(n, rows of a sequence, features)`, the values of each sequence of the batch.

        Many layers see all tokens as `(n · length, features)`, windows of images as `(n · windows, rows, features)`.
        """
        number = self.number or (len(x) if x.dim() > 2 else 0)
        if number == 1 or len(x) == number:
            return x.reshape(number, -1, x.shape[-1])
        length, rest = divmod(len(x), number) if number else (0, 1)
        is_flat = x.dim() == 2 and (length in self.lengths or not self.has_tokens)
        is_window = x.dim() > 2 and x.shape[1] != number  # else dimension 1 may be that of the sequences
        if rest or not (is_flat or is_window):
            raise ValueError(
                f"module {name!r}: its inputs have shape {tuple(x.shape)}, whose rows cannot be assigned to the "
                f"sequences of a batch (their number is {number or 'unknown'}): give batches of one sequence each, as "
                "mappings or tensors."
            )
        return x.reshape(number, -1, x.shape[-1])


def _gradient_hook(sums: Sums, sequences: _Sequences) -> Hook:
    """Returns a forward hook that adds the squared gradients of each sequence once they are known."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = sequences.split(args[0].detach(), sums.name)
        if not output.requires_grad:  # the graph begins here; a copy, because a leaf cannot be changed in place
            output = output.detach().requires_grad_().clone()
        output.register_hook(lambda gradient: _add_gradients(sums, x, gradient.reshape(*x.shape[:2], -1)))
        return output

    return hook


@torch.no_grad()
def _add_gradients(sums: Sums, x: Tensor, dy: Tensor) -> None:
    """Adds the squared gradients of n sequences, x `(n, rows, in)` and dy `(n, rows, out)`, to `sums`.

    The loss must be a mean over n.
    """
    for inputs, gradient in zip(x.float(), dy.float() * len(dy), strict=True):
        squares = (gradient.mT @ inputs).square()
        sums.add("row", squares.mean(1), "gradients")
        sums.add("column", squares.mean(0), "gradients")


def _input_hook(sums: Sums) -> Hook:
    """Returns a forward hook that adds the squares of the inputs."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        with full_precision(args[0].device.type):
            for rows in linear_rows(args[0]):
                sums.add("column", rows.square().sum(0))

    return hook


def _means(sums: Sums, shape: tuple[int, int]) -> ImportanceWeights:
    """Returns the sums of all processes in float64; zeros for a module that has seen no data."""
    column = sums.totals.get("column", torch.zeros(shape[1], dtype=torch.float64, device=sums.device))
    row = sums.totals.get("row", column.mean().expand(shape[0]).clone())  # every row reads the same inputs
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(row)
        distributed.all_reduce(column)
    return ImportanceWeights(row, column)


def _normalized(found: Mapping[str, ImportanceWeights]) -> dict[str, ImportanceWeights]:
    """Scales importance to 1 on average, with `LEAST` of it everywhere, in float32."""
    total = sum(one.row.mean().item() for one in found.values()) / len(found)
    if total == 0:
        raise ValueError("data: all inputs or gradients are zero; use other data or loss_fn.")
    return {
        name: ImportanceWeights(*(((part + LEAST * total) / total).float() for part in one))
        for name, one in found.items()
    }


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    """Returns the loss that the model computes itself."""
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


def save_importance(path: str | os.PathLike[str], importance: Mapping[str, ImportanceWeights]) -> None:
    """Writes importance weights to one safetensors file, atomically.

    Args:
        path: The file; an existing one is replaced.
        importance: Importance by module name; saved as `<module>.row` and
            `<module>.column`.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_importance(f"{folder}/fisher.safetensors", {"0": ImportanceWeights(torch.ones(3), torch.ones(4))})
        ...     list(load_importance(f"{folder}/fisher.safetensors"))
        ['0']
    """
    parts = {f"{name}.{part}": tensor for name, both in importance.items() for part, tensor in both._asdict().items()}
    with replaced_file(Path(path)) as draft:
        save_file({key: tensor.contiguous() for key, tensor in parts.items()}, draft)


def load_importance(path: str | os.PathLike[str]) -> dict[str, ImportanceWeights]:
    """Reads a file of `save_importance`, onto the CPU.

    Args:
        path: The file.

    Raises:
        ValueError: If the file was not written by `save_importance`.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_importance(f"{folder}/fisher.safetensors", {"0": ImportanceWeights(torch.ones(3), torch.ones(4))})
        ...     load_importance(f"{folder}/fisher.safetensors")["0"].row
        tensor([1., 1., 1.])
    """
    where = os.fspath(path)
    try:
        with TensorFile(Path(path)) as file:
            parts = {key: file.read(key) for key in file.tensors}
    except ValueError as error:
        raise ValueError(f"{where} was not written by save_importance: {error}") from error
    fields = ImportanceWeights._fields
    names = {key.rpartition(".")[0]: None for key in parts}
    if parts.keys() != {f"{name}.{part}" for name in names for part in fields} or not parts:
        raise ValueError(f"{where} was not written by save_importance: a row and a column by module needed.")
    for key, part in parts.items():
        if part.dim() != 1 or part.dtype not in FLOATS or not (part.isfinite() & (part >= 0)).all():
            raise ValueError(f"{where}: {key} must be a vector of finite numbers from 0; measure the importance again.")
    return {name: ImportanceWeights(*(parts[f"{name}.{part}"] for part in fields)) for name in names}
