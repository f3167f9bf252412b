"""Vision task: fine-tunes a pretrained image classifier of timm with a new head, and reports its accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import timm
import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from peft_zoo.common.values import SettingError, unknown
from peft_zoo.tasks.base.images import BUILT_IN, LAYOUTS, Source, draw_splits, open_source
from peft_zoo.tasks.base.task import Batch, Splits, Task
from peft_zoo.tasks.vision.dinov2 import NAME, TIMM_NAME, load_backbone

EXTRA = "vision"  # extra of peft-zoo that installs what this task needs
# Linear layers of attention and MLP, by timm's names; `attn` and `mlp` exclude the `proj` of the patch embedding.
LINEAR_LAYERS = r"(.*\.)?(attn|mlp)\.(qkv|q|k|v|proj|fc1|fc2)"


class VisionTask(Task):
    """Image classification with a new head; the metric is the share of test images that are classified correctly."""

    name = "vision"
    metric = "accuracy"
    higher_is_better = True
    data_choices = f"{', '.join(BUILT_IN)}, or {LAYOUTS}"
    note = "The head is new, so the accuracy before training is that of random guesses."
    defaults: ClassVar[Mapping[str, Any]] = {
        "model": NAME,
        "steps": 100,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "image_size": 112,
        "train_size": 1000,
        "eval_size": 500,
    }

    def load_data(self) -> Splits:
        """Draws images from the official splits, in equal shares of the classes."""
        settings = self.settings
        sizes = (settings.image_size or 1, settings.train_size or 1, settings.eval_size or 1)
        return Splits(*draw_splits(self._source, *sizes))

    def load_model(self) -> nn.Module:
        """Returns a timm model in float32 at the chosen image size, with a new head for the classes of the data."""
        name: str = self.settings.require("model", "give a name.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)  # the head's initial values
            model: Any = self._create(name)
        if hasattr(model, "set_input_size"):
            self._check_size(model)
            model.set_input_size(img_size=self.settings.image_size)  # resamples the position embedding
        return model

    def adapter_defaults(self, model: nn.Module) -> dict[str, Any]:
        """Returns the linear layers of attention and MLP as target modules, and the head to train in full."""
        config: Any = model.pretrained_cfg
        return {"target_modules": LINEAR_LAYERS, "modules_to_save": [str(config["classifier"])]}

    def collate(self, examples: Sequence[tuple[Tensor, int]]) -> Batch:
        """Returns float32 pixels `(batch, 3, size, size)`, normalized as in pretraining, and labels `(batch,)`."""
        pixels = torch.stack([image for image, _ in examples]).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in self._normalization)
        return {"pixels": (pixels - mean) / std, "labels": torch.tensor([label for _, label in examples])}

    def trained_module(self, model: nn.Module) -> nn.Module:
        """Returns the model with a loss, since models of timm return logits only."""
        return _Classifier(model)

    def prediction_metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        """Returns `accuracy`."""
        return accuracy

    def score(self, metrics: Mapping[str, float]) -> float:
        """Returns the accuracy, from 0 to 1."""
        return metrics["eval_accuracy"]

    @cached_property
    def _source(self) -> Source:
        return open_source(self.settings.require("data", f"give {self.data_choices}."))

    @cached_property
    def _normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        name = TIMM_NAME if self.settings.model == NAME else str(self.settings.model)
        config: Any = timm.models.get_pretrained_cfg(name)
        return config.mean, config.std

    def _create(self, name: str) -> nn.Module:
        """Creates the pretrained model with a new head."""
        classes = len(self._source.classes)
        if name == NAME:
            model: nn.Module = timm.create_model(TIMM_NAME, pretrained=False, num_classes=classes)
            head = {key: value for key, value in model.state_dict().items() if key.startswith("head.")}
            model.load_state_dict({**load_backbone(), **head}, strict=True)
            return model
        if not timm.is_model(name):
            close = [*timm.list_pretrained(f"{name.split('.')[0]}*")[:8], "another pretrained model of timm"]
            raise unknown("model", name, [NAME, *close])
        try:
            return timm.create_model(name, pretrained=True, num_classes=classes)
        except OSError as error:
            reason = " ".join(str(error).split())
            raise SettingError(
                f"--model {name!r} cannot be loaded: give {NAME} or a model of the Hub ({reason})"
            ) from error

    def _check_size(self, model: Any) -> None:
        """Raises a SettingError if the image size is not a multiple of the patch size."""
        size, patch = self.settings.image_size or 1, max(model.patch_embed.patch_size)
        if size % patch:
            raise SettingError(
                f"--image-size cannot be {size}: give a multiple of the patch size {patch}, such as {8 * patch}."
            )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Returns the share of rows of the logits `(images, classes)` whose largest entry is at the label."""
    classes = np.asarray(prediction.predictions).argmax(-1)
    return {"accuracy": float((classes == prediction.label_ids).mean())}


class _Classifier(nn.Module):
    """A network of logits, extended by the cross-entropy loss that `Trainer` needs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Returns loss and logits `(batch, classes)` of images `(batch, 3, size, size)`."""
        logits = self.network(pixels)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
