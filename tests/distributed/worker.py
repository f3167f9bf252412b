"""Program that the tests launch: trains every case with every kind of parallelism and writes the results.

    accelerate launch … worker.py OUTPUT_DIR quick|full ddp fsdp2 …

In `OUTPUT_DIR/<mode>/` each process writes `<run>.rank<n>.json` with the loss and the budget of each step, and the
first process the adapter: `<run>.safetensors`, or a folder that `Trainer` saves.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import peft_zoo
from tests.distributed.cases import MIDDLE, STEPS, Case, cases, quick

BATCH, LENGTH, VOCABULARY = 4, 16, 64
FSDP = {
    "fsdp2": {"version": 2},
    "fsdp1": {"version": 1, "sync_module_states": False, "use_orig_params": True, "activation_checkpointing": True},
    "fsdp1_flat": {"version": 1, "sync_module_states": False, "use_orig_params": False},
}


def adapted_model(case: str) -> PeftModel:
    """A tiny Llama with the case's adapter, the same in every process; its update is not zero, so all of it trains."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": LENGTH}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **depth, initializer_range=0.2))
    fields = cases()[case].fields
    config_cls = peft_zoo.methods()[cases()[case].method].config_cls
    if "init_weights" in {field.name for field in dataclasses.fields(config_cls)}:
        fields = {"init_weights": False, **fields}
    return get_peft_model(model, config_cls(target_modules=["q_proj", "v_proj", "down_proj"], **fields))


def texts(count: int) -> Tensor:
    """Token ids (count, LENGTH), the same in every process: every text repeats two tokens, which can be learned."""
    pairs = torch.randint(VOCABULARY, (count, 2), generator=torch.Generator().manual_seed(1))
    return pairs.repeat(1, LENGTH // 2)


def train_in_a_loop(case: str, mode: str, out: Path) -> dict[str, Any]:
    """Trains in a custom loop with accelerate."""
    arguments = TrainingArguments(output_dir=str(out), **fsdp_arguments(mode)).fsdp_plugin_args
    accelerator = Accelerator(cpu=True, fsdp_plugin=arguments and FullyShardedDataParallelPlugin(**arguments))
    adapted = adapted_model(case)
    if mode.startswith("fsdp1"):
        accelerator.state.fsdp_plugin.auto_wrap_policy = fsdp_auto_wrap_policy(adapted)
        model = accelerator.prepare(adapted)
        optimizer = accelerator.prepare(optimizer_of(model))
    else:
        model, optimizer = accelerator.prepare(adapted, optimizer_of(adapted))
    share = BATCH // accelerator.num_processes
    rows = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    chosen = cases()[case]
    after_step = chosen.start(adapted) if chosen.start else None
    losses, budgets = [], []
    for step, batch in enumerate(texts(STEPS * BATCH).split(BATCH), start=1):
        loss = model(input_ids=batch[rows], labels=batch[rows]).loss
        accelerator.backward(loss)
        optimizer.step()
        if after_step is not None:
            after_step(step, optimizer)
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        budgets.append(chosen.budget(adapted))
    assert mode != "fsdp1" or any(isinstance(module, CheckpointWrapper) for module in model.modules())
    state = full_state_dict_of_fsdp1(model) if mode.startswith("fsdp1") else accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        save_file(get_peft_model_state_dict(adapted, state_dict=state), out / f"{case}.safetensors")
    return {"losses": losses, "budgets": budgets}


def full_state_dict_of_fsdp1(model: FullyShardedDataParallel) -> dict[str, Tensor]:
    """Equals `accelerator.get_state_dict` without its offloading, which frees tensors on a CPU (pytorch#188989)."""
    whole = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, whole):
        return model.state_dict()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


class Budgets(TrainerCallback):
    """Records the budget after each step."""

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.model, self.case, self.steps = model, case, []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(self.case.budget(self.model))


def train_with_trainer(case: str, mode: str, out: Path, resume: bool = False) -> dict[str, Any]:
    """Trains with `transformers.Trainer` and the method's callback, or resumes such a run in the middle."""
    model, out = adapted_model(case), out / f"{case}_trainer"
    budgets = Budgets(model, cases()[case])
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", 1)),
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no" if mode in FSDP or resume else "steps",
        save_steps=MIDDLE,
        report_to="none",
        disable_tqdm=True,
        **fsdp_arguments(mode, activation_checkpointing=True),
    )
    callback = peft_zoo.methods()[cases()[case].method].callback(model)
    data = [{"input_ids": text, "labels": text} for text in texts(STEPS * BATCH)]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback, budgets])
    trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{MIDDLE}") if resume else None)
    assert mode not in FSDP or any(isinstance(module, CheckpointWrapper) for module in model.modules())
    trainer.save_model(str(out / "resumed" if resume else out / "whole"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "budgets": budgets.steps}


def fsdp_arguments(mode: str, **options: Any) -> dict[str, Any]:
    """The arguments of `TrainingArguments` for a mode, with options of FSDP."""
    return {"use_cpu": True, **({"fsdp": True, "fsdp_config": FSDP[mode] | options} if mode in FSDP else {})}


def allow_fsdp_on_cpu() -> None:
    """Makes accelerate use an FSDP plugin on a CPU, where it ignores the plugin and trains with DDP."""
    original = AcceleratorState.__init__

    def patched(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            # The device is set too: FSDP1 compares it with that of the parameters, which has no index.
            choices = {"distributed_type": DistributedType.FSDP, "device": torch.device("cpu")}
            PartialState._shared_state.update(choices)
            self.__dict__.update(choices)

    AcceleratorState.__init__ = patched


def forget_accelerate() -> None:
    """Resets accelerate, which keeps its choices in class attributes and in the environment."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))]:
        del os.environ[name]


def main(out: Path, extent: str, modes: list[str]) -> None:
    """Runs all cases with all modes, or without `full` those that `quick` selects."""
    allow_fsdp_on_cpu()
    rank = os.environ.get("RANK", "0")
    for mode in modes:
        folder = out / mode
        folder.mkdir(exist_ok=True)
        names = [name for name, case in cases().items() if case.fsdp or mode not in FSDP]
        chosen = [name for name in names if extent == "full" or quick(mode, name)]
        runs = {name: partial(train_in_a_loop, name) for name in chosen}
        for name in (name for name, case in cases().items() if case.trainer):
            if not mode.startswith("fsdp1"):  # Trainer saves with the offloading of `accelerator.get_state_dict`
                runs[f"{name}_trainer"] = partial(train_with_trainer, name)
            if mode not in FSDP:
                runs[f"{name}_trainer_resumed"] = partial(train_with_trainer, name, resume=True)
        for name, run in runs.items():
            (folder / f"{name}.rank{rank}.json").write_text(json.dumps(run(mode, folder)))
            forget_accelerate()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
