"""What a task is: a model, its data, a metric, and how the three meet in `transformers.Trainer`."""

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
    """Three data sets without overlap: fit on `train`, choose on `validation`, report `test` once."""

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]


class Task(ABC):
    """One kind of job.

    Attributes:
        name: As in `--task`.
        metric: What `score` returns, as in `"perplexity"`.
        higher_is_better: Which way the metric improves.
        data_choices: What `--data` can be, for the error when it is missing.
        note: What a reader of the report must know about the first score; may be empty.
        defaults: Settings used where the user said nothing.
        settings: The run's settings, completed by what the method suggests and by `defaults`.

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
        """Read the data and cut it into splits. The same settings give the same splits, whatever the seed."""

    @abstractmethod
    def load_model(self) -> nn.Module:
        """A fresh base model in float32. Every call returns the same bits."""

    @abstractmethod
    def adapter_defaults(self, model: nn.Module) -> dict[str, Any]:
        """Configuration fields the task suggests for any method, such as `target_modules`."""

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> Batch:
        """Stack examples into the keyword arguments of the trained module."""

    def trained_module(self, model: nn.Module) -> nn.Module:
        """The module that `Trainer` calls: returns a loss (and logits) for a batch. Usually `model` itself."""
        return model

    def prediction_metrics(self) -> Callable[[EvalPrediction], dict[str, float]] | None:
        """What computes metrics from logits and labels; None where the loss says everything."""
        return None

    @abstractmethod
    def score(self, metrics: Mapping[str, float]) -> float:
        """The task's metric from what `Trainer.evaluate` returned."""
