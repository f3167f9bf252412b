"""Training with transformers' Trainer: stopping, resuming, saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor

from peft_zoo import Method
from tests.adapters.models import CHECKPOINTING, adapted, bits, fresh, inputs, is_adapter, output, spread


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Twelve rows of tokens that are their own labels."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = inputs("llama")["input_ids"][index % 3].roll(index)
        return {"input_ids": row, "labels": row.clone()}


def trainer(method: Method, folder: Path, steps: int, **changes: Any) -> transformers.Trainer:
    """A Trainer of a new Llama with a schedule of four steps, stopped after `steps`."""
    torch.manual_seed(0)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=3,
        learning_rate=0.05,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **changes,
    )
    model = adapted(method, "llama").train()

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= steps

    callbacks: list[Any] = [Stop()]
    return transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=callbacks)


def losses(run: transformers.Trainer) -> list[float]:
    """The loss of each step."""
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_training_resumes_where_it_stopped(method: Method, tmp_path: Path) -> None:
    whole = trainer(method, tmp_path / "whole", 4)
    frozen = {k: bits(p) for k, p in whole.model.named_parameters() if not p.requires_grad}
    before = {k: bits(p) for k, p in whole.model.named_parameters() if p.requires_grad}
    whole.train()
    assert whole.state.global_step == 4
    assert losses(whole)[-1] < losses(whole)[0]
    for key, parameter in whole.model.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(bits(parameter), before[key]), key
        else:
            assert torch.equal(bits(parameter), frozen[key]), key

    trainer(method, tmp_path / "part", 2).train()
    assert (tmp_path / "part" / "checkpoint-2" / "adapter_model.safetensors").exists()
    resumed = trainer(method, tmp_path / "part", 4)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    for (key, one), (_, other) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(bits(one), bits(other)), key

    loaded = PeftModel.from_pretrained(fresh("llama"), tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(output(loaded.eval(), "llama"), output(whole.model.eval(), "llama"))


def test_the_best_checkpoint_is_loaded_at_the_end(method: Method, tmp_path: Path) -> None:
    run = trainer(
        method,
        tmp_path,
        4,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2"), "the worst, as asked"
    loaded = PeftModel.from_pretrained(fresh("llama"), tmp_path / "checkpoint-2")
    assert torch.equal(output(run.model.eval(), "llama"), output(loaded, "llama"))


@pytest.mark.parametrize(("method", "reentrant"), spread([True, False]))
def test_with_gradient_checkpointing(method: Method, reentrant: bool, tmp_path: Path) -> None:
    plain = trainer(method, tmp_path / "plain", 2)
    plain.train()
    settings = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    checkpointed = trainer(method, tmp_path / "checkpointed", 2, **settings)
    checkpointed.train()
    assert losses(checkpointed) == losses(plain)


def test_in_bf16(method: Method, tmp_path: Path) -> None:
    run = trainer(method, tmp_path, 4, bf16=True)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    trained = {k: p for k, p in run.model.named_parameters() if p.requires_grad}
    assert all(is_adapter(k, run.model.active_peft_config) for k in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
