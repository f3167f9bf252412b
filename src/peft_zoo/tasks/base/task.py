"""Base class of a task: a model, its data, a metric, and how `transformers.Trainer` uses them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction

from peft_zoo.tasks.base.methods import suggested_settings
from peft_zoo.tasks.base.settings import TrainSettings

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Splits:
    """Three disjoint data sets: train on `train`, choose settings on `validation`, report the score on `test`."""

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]


class Task(ABC):
    """A fine-tuning task.

    Attributes:
        name: Value of `--task`.
        metric: Name of the metric that `score` returns, such as `"perplexity"`.
        higher_is_better: Whether a higher value of the metric is better.
        data_choices: Valid values of `--data`, for error messages.
        note: Remark on the scores for readers of the report; may be empty.
        defaults: Default values of settings.
        settings: Settings of the run, completed by those that the method suggests and by `defaults`.

    Raises:
        SettingError: If the settings name a method that does not exist, or belong to another task.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    data_choices: ClassVar[str]
    note: ClassVar[str] = ""
    defaults: ClassVar[Mapping[str, Any]]

    def __init__(self, settings: TrainSettings) -> None:
        settings.refuse_foreign()
        self.settings = settings.completed({**self.defaults, **suggested_settings(settings.method)})

    @abstractmethod
    def load_data(self) -> Splits:
        """Reads the data and divides it into splits, which do not depend on the seed."""

    @abstractmethod
    def load_model(self) -> nn.Module:
        """Returns a new base model in float32; every call returns the same bits."""

    @abstractmethod
    def adapter_defaults(self, model: nn.Module) -> dict[str, Any]:
        """Returns fields that the task suggests for the configuration of any method, such as `target_modules`."""

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> Batch:
        """Stacks examples into the keyword arguments of the trained module."""

    def trained_module(self, model: nn.Module) -> nn.Module:
        """Returns the module that `Trainer` calls and that returns a loss (and logits); by default `model`."""
        return model

    def prediction_metrics(self) -> Callable[[EvalPrediction], dict[str, float]] | None:
        """Returns the function that computes metrics from logits and labels; None if the loss is enough."""
        return None

    @abstractmethod
    def score(self, metrics: Mapping[str, float]) -> float:
        """Returns the task's metric from the result of `Trainer.evaluate`."""
