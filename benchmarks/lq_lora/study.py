"""Measures the perplexity of quantized language models before and after a short fine-tune: LQ-LoRA and other methods.

    python -m benchmarks.lq_lora.study --dtype bfloat16 --eval-size 16 --rates 0.0001,0.0003,0.001,0.003,0.01

SmolLM2-135M learns the worked answers of GSM8K (the excerpt that ships with the package), scored by perplexity on
held-out problems, before the first step and after the last. Every recipe has rank 16 and scale 1 on all linear layers:

    LoRA               on the unquantized base; `--dtype bfloat16` for 16 bits
    QLoRA 4.13         on bitsandbytes' NF4 with quantized scales, B = 0: before tuning it is plain NF4
    LoftQ 4.5          peft's, one iteration, NF4 with scales in float32; the base is used dequantized
    LQ-LoRA 4.13       every weight as in QLoRA (`qconfig="nf4"`), and A and B from the decomposition
    LQ-LoRA 4 to 2.5   a bit budget
    LQ-LoRA (fitted)   errors weighted by the Fisher information of 128 sequences of the training split, and levels
                       fitted to every weight

Bits are per weight of the base. LQ-LoRA's decomposition depends on neither rate nor seed, so a recipe's first run saves
it and the others load it; only the first run includes its time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes
from peft import PeftModel
from torch import nn

from benchmarks import study
from benchmarks.lq_lora.loftq import loftq_anywhere
from benchmarks.study import Recipe
from peft_zoo.lq_lora import preprocess_lq_lora
from peft_zoo.tasks.base.methods import build_config
from peft_zoo.tasks.base.task import Task
from peft_zoo.tasks.base.training import adapt

RANK = 16
LORA = {"r": str(RANK), "lora_alpha": str(RANK)}
SEQUENCES = 128
LOFTQ = {"init_lora_weights": "loftq", "loftq_config": json.dumps({"loftq_bits": 4, "loftq_iter": 1})}


# ---- peers ----


def qlora(task: Task, base: Any) -> Any:
    """Adds a LoRA to the base in bitsandbytes' NF4 with quantized scales."""
    quantize_nf4(base)
    return adapt(task, base)


def quantize_nf4(model: Any) -> None:
    """Replaces every linear layer but the last by a `Linear4bit`, as transformers does when it loads in 4 bits."""
    head, dtype = model.get_output_embeddings(), next(model.parameters()).dtype
    for name, module in [*model.named_modules()]:
        if type(module) is nn.Linear and module is not head:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _linear_nf4(module, dtype))
    model.is_loaded_in_4bit = True  # peft looks here


def _linear_nf4(linear: nn.Linear, dtype: Any) -> nn.Module:
    options: dict[str, Any] = {"compute_dtype": dtype, "compress_statistics": True, "quant_type": "nf4"}
    shape = linear.in_features, linear.out_features
    found: Any = bitsandbytes.nn.Linear4bit(*shape, bias=linear.bias is not None, **options)
    found.load_state_dict(linear.state_dict())
    found = found.to(linear.weight.device)  # quantizes
    # Otherwise scoring before training would pack it permanently for products without a gradient.
    found.support_avx512bf16_for_cpu = False
    return found


def loftq(task: Task, base: Any) -> Any:
    """Adds a LoRA that is initialized by peft's LoftQ, with or without a GPU."""
    with loftq_anywhere():
        return adapt(task, base)


# ---- ours ----


def once(make: Callable[[Task, Any], Any], task: Task, base: Any) -> Any:
    """Returns the adapted model of `make`, loaded from a file from the second call on."""
    known = make.__name__, task.settings.model, str(base.dtype), sorted(task.settings.options.items())
    name = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    folder = Path(task.settings.output) / "decomposed" / name
    if folder.is_dir():
        return PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    model = make(task, base)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = tempfile.mkdtemp(dir=folder.parent)
    model.save_pretrained(draft)
    if not folder.is_dir():  # another process may have been faster
        os.replace(draft, folder)
    return model


def weighted(task: Task, base: Any) -> Any:
    """Adapts with LQ-LoRA and importance weights from the training texts."""
    settings = task.settings
    defaults = task.adapter_defaults(base)
    config: Any = build_config(str(settings.method), settings.options, defaults, settings.require("steps", ""))
    texts: Any = task.load_data().train
    count = min(SEQUENCES, len(texts))
    preprocess_lq_lora(base, config, [{"input_ids": texts[place][None].to(base.device)} for place in range(count)])
    return adapt(task, base)


ONCE, WEIGHTED = functools.partial(once, adapt), functools.partial(once, weighted)
RATES, MIDDLE, LOW = (0.0001, 0.0003, 0.001, 0.003, 0.01), (0.0003, 0.001, 0.003), (0.0001, 0.0003, 0.001)
"""Learning rates of LQ-LoRA, whose factors are large from the start: all at 4.13 bits, the middle ones with budgets,
the low ones with weighted errors."""

BUDGETS = "4", "3", "2.75", "2.5"
FITTED = {"weighting": "fisher", "codebook": "lloyd"}

RECIPES = {
    "LoRA": Recipe("lora", LORA),
    "QLoRA 4.13": Recipe("lora", LORA, adapt=qlora),
    "LoftQ 4.5": Recipe("lora", {**LORA, **LOFTQ}, adapt=loftq),
    "LQ-LoRA 4.13": Recipe("lq_lora", {**LORA, "qconfig": "nf4"}, RATES, adapt=ONCE),
    **{f"LQ-LoRA {bits}": Recipe("lq_lora", {**LORA, "budget_bits": bits}, MIDDLE, adapt=ONCE) for bits in BUDGETS},
    "LQ-LoRA (fitted) 4.13": Recipe("lq_lora", {**LORA, "qconfig": "nf4", **FITTED}, LOW, adapt=WEIGHTED),
    **{
        f"LQ-LoRA (fitted) {bits}": Recipe("lq_lora", {**LORA, "budget_bits": bits, **FITTED}, LOW, adapt=WEIGHTED)
        for bits in BUDGETS[1:]
    },
}
DEFAULTS = {"steps": 48, "eval_size": 16}


def main(arguments: Sequence[str] | None = None) -> int:
    return study.main("lq_lora", __doc__, RECIPES, arguments, before=True, defaults=DEFAULTS)


if __name__ == "__main__":
    raise SystemExit(main())
