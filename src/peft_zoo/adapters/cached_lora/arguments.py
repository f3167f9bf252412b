"""The arguments of one call of a denoiser, by name, and copies of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

TIMESTEP = ("timestep", "timesteps", "t")
POSITIONS = ("img_ids", "txt_ids")  # a row for each token, not for each sample


def argument_names(denoiser: nn.Module) -> list[str]:
    """Names of the arguments of a denoiser's forward; the first is the sample."""
    return list(inspect.signature(type(denoiser).forward).parameters)[1:]


def call_arguments(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the denoiser by name, in the order of its signature."""
    names = argument_names(denoiser)
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return {name: given[name] for name in (*(n for n in names if n in given), *(n for n in given if n not in names))}


def noise_level(denoiser: nn.Module, arguments: Mapping[str, Any]) -> tuple[float, bool]:
    """The timestep of a call, and whether that is a choice among several.

    Video models can have one for each token or frame. Where some of them are given, these have 0, and the step is that
    of the others.

    Raises:
        ValueError: If there is none.
    """
    timestep = next((arguments[name] for name in TIMESTEP if arguments.get(name) is not None), None)
    if timestep is None:
        raise ValueError(f"{type(denoiser).__name__} was called without a timestep, by which steps are told: give one.")
    levels = torch.as_tensor(timestep).unique().tolist()
    return float(levels[-1]), len({*levels} - {0}) > 1


def repeated(arguments: dict[str, Any], times: int) -> dict[str, Any]:
    """Arguments for a batch with `times` copies of each sample; lists are copied, as T2I-Adapter's are emptied."""
    rows = len(next(iter(arguments.values())))

    def repeat(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: repeat(key, item) for key, item in value.items()}
        if isinstance(value, list):
            return [repeat(name, item) for item in value]
        if times == 1 or name in POSITIONS or not isinstance(value, Tensor) or not value.ndim or len(value) != rows:
            return value
        return torch.cat([value] * times)

    return {name: repeat(name, value) for name, value in arguments.items()}


__all__: list[str] = []
