"""Language task: fine-tunes a causal language model on text and reports its perplexity on held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_zoo.common.values import SettingError
from peft_zoo.tasks.base.task import Batch, Splits, Task
from peft_zoo.tasks.language.smollm2 import NAME, smollm2_folder
from peft_zoo.tasks.language.text import SHIPPED, SPLITS, load_texts, windows

EXTRA = "tasks"  # extra of peft-zoo that installs what this task needs


class LanguageTask(Task):
    """Next-token prediction on windows of `max_length` tokens; the metric is exp of the mean loss per token."""

    name = "language"
    metric = "perplexity"
    higher_is_better = False
    data_choices = f"{', '.join(SHIPPED)}, or the path of a .txt or .jsonl file"
    defaults: ClassVar[Mapping[str, Any]] = {
        "model": NAME,
        "data": "shakespeare",
        "steps": 100,
        "batch_size": 1,
        "learning_rate": 1e-3,
        "max_length": 256,
        "eval_size": 32,
    }

    def load_data(self) -> Splits:
        """Returns token windows of the chosen text."""
        settings = self.settings
        texts = load_texts(settings.require("data", f"give {self.data_choices}."))
        tokenizer = self._load(AutoTokenizer)
        limits = {"train": settings.train_size}
        return Splits(
            **{
                split: windows(
                    texts[split], tokenizer, settings.max_length or 1, limits.get(split, settings.eval_size), split
                )
                for split in SPLITS
            }
        )

    def load_model(self) -> nn.Module:
        """Loads the base model in float32, without a key-value cache."""
        model: Any = self._load(AutoModelForCausalLM, dtype=torch.float32)
        model.config.use_cache = False
        return model

    def adapter_defaults(self, model: nn.Module) -> dict[str, Any]:
        """Returns all linear layers as target modules, and the task type."""
        return {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}

    def collate(self, examples: Sequence[Tensor]) -> Batch:
        """Stacks windows; the labels are the tokens, which the model shifts."""
        tokens = torch.stack(list(examples))  # (batch, length)
        return {"input_ids": tokens, "labels": tokens.clone()}

    def score(self, metrics: Mapping[str, float]) -> float:
        """Returns the perplexity; infinity if exp of the loss overflows."""
        loss = metrics["eval_loss"]
        return math.exp(loss) if loss < 700 else math.inf

    def _load(self, auto_class: Any, **options: Any) -> Any:
        """Loads the chosen model, built in, from a folder or from the Hub, with `auto_class.from_pretrained`."""
        name: str = self.settings.require("model", "give a name or a path.")
        source = str(smollm2_folder()) if name == NAME else name
        try:
            return auto_class.from_pretrained(source, **options)
        except (OSError, HFValidationError) as error:
            reason = " ".join(str(error).split())
            raise SettingError(
                f"--model {name!r} cannot be loaded: give {NAME}, the folder of a model, or a Hub id ({reason})"
            ) from error
