"""Importance weights of a model's target layers, from data to the SVD of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from peft_zoo.adapters.lq_lora.config import LqLoraConfig
from peft_zoo.adapters.lq_lora.targets import target_layers, with_default_targets
from peft_zoo.calibration.fisher import ImportanceWeights, estimate_importance
from peft_zoo.calibration.rows import matrix_shape
from peft_zoo.kernels.low_rank.quantized import Diagonals

Importance = Mapping[str, ImportanceWeights]
"""Importance weights by module name."""

ROW, COLUMN, BOTH = (True, False), (False, True), (True, True)
HEURISTICS = {"two-sided": [BOTH], "row": [ROW], "col": [COLUMN], "auto": [BOTH, ROW, COLUMN]}
"""Whether the SVD weights rows and columns, for each variant to try."""

_prepared: WeakKeyDictionary[nn.Module, Importance] = WeakKeyDictionary()


def preprocess_lq_lora(
    model: nn.Module,
    config: LqLoraConfig,
    data: Iterable[Any] | Importance,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
) -> dict[str, ImportanceWeights]:
    """Estimates the importance weights that `get_peft_model(model, config)` quantizes the model with.

    Args:
        model: The base model, in floating-point; run in evaluation mode and left unchanged. A later `get_peft_model` on
            the same object uses the result.
        config: A configuration with `weighting="fisher"` or `"activation"`.
        data: Batches, each a mapping for `model(**batch)` or an argument of `loss_fn`; 128 to 256 sequences are usual.
            Sequences of one batch should have equal lengths, and padding counts as input. Or the result of an earlier
            call.
        loss_fn: Function `(model, batch)` that returns the loss. By default the model's own; the labels of a batch that
            has none are its `input_ids`.

    Returns:
        Importance weights by module name. With several processes (`torch.distributed`) those of all their data.

    Raises:
        ValueError: If no layer is targeted, or the data gives no loss or values that are not finite.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_zoo import LqLoraConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> config = LqLoraConfig(r=4, target_modules=["0"], weighting="fisher")
        >>> batches = [torch.randn(8, 64)]
        >>> found = preprocess_lq_lora(model, config, batches, lambda model, x: model(x).square().mean())
        >>> found["0"].row.shape, found["0"].column.shape
        (torch.Size([32]), torch.Size([64]))
        >>> model = get_peft_model(model, config)
    """
    if config.weighting == "none":
        raise ValueError("LqLoraConfig: weighting='none' uses no data; set it to 'fisher' or 'activation'.")
    layers = dict(target_layers(with_default_targets(config, model), model, check_target_module_exists))
    if not layers:
        raise ValueError(f"target_modules={config.target_modules!r} targets no linear layer; name some.")
    if isinstance(data, Mapping):
        importance = dict(data)
    else:
        importance = estimate_importance(model, layers, config.weighting, data, loss_fn)  # type: ignore[arg-type]
    for name, layer in layers.items():
        rows, columns = matrix_shape(layer)
        found = importance.get(name)
        if found is None or found.row.shape != (rows,) or found.column.shape != (columns,):
            raise ValueError(f"data: importance of {name} is missing or not of the shapes ({rows},) and ({columns},).")
    _prepared[model] = importance
    return importance


def prepared_importance(model: nn.Module) -> Importance:
    """Returns the result of the last `preprocess_lq_lora` on a model; empty if there was none."""
    return _prepared.get(model, {})


def svd_weights_and_metric(
    config: LqLoraConfig, name: str, importance: ImportanceWeights | None
) -> tuple[list[Diagonals], Diagonals | None]:
    """Returns the diagonals to try for the SVD of a layer, and those that its error is measured with.

    Raises a ValueError if the configuration needs importance weights and there are none.
    """
    if config.weighting == "none":
        return [(None, None)], None
    if importance is None:
        raise ValueError(
            f"LqLoraConfig: weighting={config.weighting!r} needs importance weights of {name}; call "
            "preprocess_lq_lora(model, config, data) before get_peft_model, with the same model."
        )
    row, column = importance.diagonals(config.weighting_eps)
    choices = HEURISTICS[config.heuristic]
    return [(row if by_row else None, column if by_column else None) for by_row, by_column in choices], (row, column)
