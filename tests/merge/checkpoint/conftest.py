"""Tiny checkpoints, adapters of them, and what peft and transformers make of both in memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from peft_zoo.io.checkpoint import Checkpoint

SIZE: Any = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
BERT: Any = {**SIZE, "num_key_value_heads": None}
BUILD: dict[str, Callable[..., Any]] = {
    "llama": lambda **more: LlamaForCausalLM(LlamaConfig(**{**SIZE, **more})),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64, n_positions=16)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=12, num_experts_per_tok=2, **SIZE)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=4, moe_intermediate_size=16, **SIZE)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(num_local_experts=4, head_dim=8, **SIZE)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=4, vocab_size=64)
    ),
    "vit": lambda: ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **BERT)),
    "bert": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "qwen2_vl": lambda: Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=dict(SIZE), vision_config={"depth": 1, "embed_dim": 32, "num_heads": 4, "hidden_size": 32}
        )
    ),
}


class Made:
    """Folders of bases, made once, and of adapters."""

    def __init__(self, root: Path) -> None:
        self.root, self.count = root, 0

    def base(self, name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
        """Folder of a checkpoint in shards of 40 kB."""
        folder = self.root / "-".join([name, str(dtype), *map(str, more.items())])
        if not folder.exists():
            torch.manual_seed(0)
            BUILD[name](**more).to(dtype).save_pretrained(folder, max_shard_size="40kB")
        return folder

    def adapter(self, base: Path, config: Any, seed: int = 1, prepare: Callable[[Any], None] | None = None) -> Path:
        """Folder of an adapter of a base whose trained parameters are random."""
        self.count += 1
        folder = self.root / f"adapter-{self.count}"
        model = load(base)
        if prepare is not None:
            prepare(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, config)
            torch.manual_seed(seed)
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.1 * torch.randn(parameter.shape)
            adapted.save_pretrained(folder)
        return folder

    def new(self) -> Path:
        """Name of a folder that does not exist."""
        self.count += 1
        return self.root / f"out-{self.count}"


def load(folder: Path) -> Any:
    """The model of a folder, in its own dtype."""
    with Checkpoint(folder) as source:
        import transformers

        kind: Any = getattr(transformers, source.config["architectures"][0])
    return kind.from_pretrained(folder, dtype="auto").eval()


def in_memory(base: Path, adapter: Path, out: Path) -> dict[str, Tensor]:
    """The tensors in the files of a merge by peft, saved by transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(load(base), adapter).merge_and_unload().save_pretrained(out)
    return tensors(out)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors in the files of a checkpoint."""
    with Checkpoint(folder) as source:
        return {key: source.read(key) for key in source.tensors}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ in a bit, or that one of two checkpoints lacks."""
    both = one.keys() & other.keys()
    return sorted(one.keys() ^ other.keys()) + [key for key in sorted(both) if not torch.equal(one[key], other[key])]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("merge"))
