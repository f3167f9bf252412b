"""Tiny language models as llama.cpp and MLX-LM read them, run by these programs in processes of their own."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from peft_zoo.merge.base.child import run_in_child
from peft_zoo.merge.formats.format import ConvertOptions
from peft_zoo.merge.formats.gguf import ARCHITECTURES, names_of

VOCABULARY = 64
TOKENS = [5, 9, 22, 41, 17, 33]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, Any] = {
    "llama": lambda **more: LlamaForCausalLM(LlamaConfig(**{**SIZES, **more})),
    "mistral": lambda **more: MistralForCausalLM(MistralConfig(**{**SIZES, "sliding_window": None, **more})),
    "qwen2": lambda **more: Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **more})),
    "qwen3": lambda **more: Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 16, **more})),
}


def model(kind: str, **more: Any) -> Any:
    """A model of a family, the same each time."""
    torch.manual_seed(0)
    return MODELS[kind](**more).eval()


def lora(kind: str, folder: Path, **fields: Any) -> Any:
    """Saves base and LoRA, and returns the adapted model."""
    base = model(kind)
    base.save_pretrained(folder / "base")
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False, **fields})
    adapted = get_peft_model(base, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data *= 3
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        adapted.save_pretrained(folder / "lora")
    return adapted


@torch.no_grad()
def log_probabilities(found: Any) -> Tensor:
    """Logarithms of the probabilities of the next token."""
    return found(input_ids=torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1)


def write_model(found: Any, path: Path) -> Path:
    """Writes a model as a GGUF file with a vocabulary of bytes."""
    import gguf

    config = found.config.to_dict() | {"architectures": [type(found).__name__]}
    names = names_of(ConvertOptions(config=config))
    architecture = ARCHITECTURES[type(found).__name__]
    writer = gguf.GGUFWriter(str(path), architecture.name)
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float((config.get("rope_parameters") or {}).get("rope_theta", 10000.0)))
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(61))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, *[6] * 61])
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.name.upper()), 2)
    for name, value in found.state_dict().items():
        module, _, kind = name.rpartition(".")
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            value = names.reordered(module, value, lambda heads, half: (heads, 2, half))
        writer.add_tensor(f"{table.get_name(module)}.{kind}", np.ascontiguousarray(value.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA = """
import json, sys
import xllamacpp
job = json.loads(sys.stdin.read())
parameters = xllamacpp.CommonParams()
parameters.model.path = job["model"]
parameters.n_ctx, parameters.n_parallel, parameters.warmup = 64, 1, False
parameters.cpuparams.n_threads = 1
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if job["lora"]:
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(job["lora"], 1.0)]
server = xllamacpp.Server(parameters)
request = {"prompt": job["tokens"], "n_predict": 1, "n_probs": job["size"], "temperature": 0.0}
found = server.handle_completions(request)
print("peft-zoo child: " + json.dumps(found))
"""


def by_llama_cpp(path: Path, adapter: Path | None) -> Tensor:
    """Logarithms of the probabilities of the next token by llama.cpp."""
    job = {"model": str(path), "lora": None if adapter is None else str(adapter), "tokens": TOKENS, "size": VOCABULARY}
    found = run_in_child(LLAMA, json.dumps(job), "llama.cpp does not load the adapter")
    rows = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    result = torch.full((VOCABULARY,), float("nan"))
    for row in rows:
        result[row["id"]] = row["logprob"]
    return result
