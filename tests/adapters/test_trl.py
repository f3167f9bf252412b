"""TRL's trainers with every method that trains: supervised fine-tuning, and DPO against the disabled adapter."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import peft_zoo
from peft_zoo import Method

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of pyarrow and TRL, about their own dependencies
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TRAINABLE = [method for method in peft_zoo.methods().values() if method.trainable]
PAIRS = [
    {"prompt_ids": [3, 4], "chosen_ids": [5, 6, 1], "rejected_ids": [7, 1]},
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 1], "rejected_ids": [9, 10, 1]},
]
TEXTS = [{"input_ids": [3, 4, 5, 6, 1]}, {"input_ids": [7, 8, 9, 1]}]


def base() -> LlamaForCausalLM:
    """Returns a model of one layer, with the same weights every time."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_attention_heads=2, initializer_range=0.5))


def config(method: Method, steps: int = 1) -> Any:
    """Returns a configuration of the method for a run of `steps`."""
    fields = {**method.config_cls.conformance.arguments, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return method.config_cls(**fields).for_training(steps)


def run(kind: str, folder: Path, model: Any, peft_config: Any = None, method: Method | None = None, **more: Any) -> Any:
    """Returns a trainer of TRL after one step; the rows are tokenized already."""
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghi"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")), pad_token="<pad>", eos_token="<eos>"
    )
    common: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "bf16": False}
    common |= {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "logging_steps": 1,
        "learning_rate": 0.1,
    }
    common |= {"gradient_checkpointing": False, "disable_tqdm": True, "dataloader_pin_memory": False}
    common |= {"dataset_kwargs": {"skip_prepare_dataset": True}} if kind == "SFT" else {}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(**common),
        train_dataset=datasets.Dataset.from_list(PAIRS if kind == "DPO" else TEXTS),
        processing_class=tokenizer,
        peft_config=peft_config,
        **more,
    )
    if method is not None and method.callback is not None:
        trainer.add_callback(method.callback(trainer.model))
    trainer.train()
    return trainer


@pytest.fixture(autouse=True)
def tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the rows as they are."""
    monkeypatch.setattr(trl.DPOTrainer, "_prepare_dataset", lambda self, dataset, *_: dataset)


def first_loss(trainer: Any) -> float:
    return trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("method", TRAINABLE, ids=lambda method: method.name)
def test_dpo_begins_at_the_reference(method: Method, tmp_path: Path) -> None:
    """The model equals its reference, itself without the adapter, at the first step: the loss is log 2."""
    trainer = run("DPO", tmp_path, base(), config(method), method)
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-3)
    assert trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, id=m.name, marks=[] if m.name == "lq_lora" else [pytest.mark.full]) for m in TRAINABLE],
)
def test_sft_trains_what_is_saved(method: Method, tmp_path: Path) -> None:
    trainer = run("SFT", tmp_path, base(), config(method), method)
    assert 1 < first_loss(trainer) < 10
    trainer.save_model(str(tmp_path / "adapter"))
    tokens = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        fresh = get_peft_model(base(), config(method)).eval()(tokens).logits
        found = trainer.model.eval()(tokens).logits
        again = PeftModel.from_pretrained(base(), str(tmp_path / "adapter")).eval()(tokens).logits
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, fresh, atol=1e-4)
    if method.name == "lq_lora":  # TRL copies a trained adapter of this kind as the reference
        model = PeftModel.from_pretrained(base(), str(tmp_path / "adapter"), is_trainable=True)
        assert first_loss(run("DPO", tmp_path, model)) == pytest.approx(math.log(2), abs=1e-3)
    if method.name == "snell":  # for others it has to be given the merged model
        model = PeftModel.from_pretrained(base(), str(tmp_path / "adapter"), is_trainable=True)
        trainer = run("DPO", tmp_path, model, ref_model=copy.deepcopy(model).merge_and_unload())
        assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-3)
