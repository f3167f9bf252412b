"""Matrices of quantized checkpoints have the values of the library that wrote them, and are quantized again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from peft_zoo.io.checkpoint import Checkpoint
from peft_zoo.io.header import TensorInfo
from peft_zoo.io.stored_format import DenseTensor, StoredFormat
from peft_zoo.lq_lora import LqLoraConfig, standalone
from peft_zoo.merge.base.stored_formats import stored_format

KEY = "model.layers.0.mlp.down_proj.weight"


def dense_tensors(model: nn.Module) -> dict[str, DenseTensor]:
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    return {
        name: DenseTensor(TensorInfo(tensor.dtype, tuple(tensor.shape)), name, name in transposed)
        for name, tensor in model.state_dict().items()
    }


def open_format(source: Checkpoint, model: nn.Module) -> StoredFormat:
    found = stored_format(source.config["quantization_config"], source.tensors, dense_tensors(model), source.read)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    torch.manual_seed(0)
    size: Any = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **size)).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder / "base")
    return folder, model


@pytest.mark.parametrize(
    "quantization",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True},
    ],
    ids=["nf4", "fp4", "int8"],
)
def test_bitsandbytes(llama: tuple[Path, LlamaForCausalLM], quantization: dict[str, Any]) -> None:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    folder, base = llama
    config = BitsAndBytesConfig(**quantization)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=config, dtype=torch.bfloat16)
    out = folder / "-".join(map(str, quantization.values()))
    model.save_pretrained(out)
    layer = model.model.layers[0].mlp.down_proj
    wanted = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
    with Checkpoint(out) as source:
        stored = open_format(source, base)
        assert len(stored.matrices) == 7
        assert {part for matrix in stored.matrices.values() for part in matrix.parts} >= {
            name for name in source.tensors if "proj" in name
        }
        found = stored.dequantize(KEY)
        assert torch.equal(found, wanted)
        assert stored.matrices[KEY].info == TensorInfo(torch.bfloat16, (64, 128))
        check_same_after_quantizing(stored, source, KEY, found)


def read(new: dict[str, Tensor], source: Checkpoint, name: str) -> Tensor:
    return new[name] if name in new else source.read(name)


def check_same_after_quantizing(
    stored: StoredFormat, source: Checkpoint, key: str, matrix: Tensor, bound: float = 0.01
) -> None:
    """The dequantized matrix is quantized to the same codes, in tensors of the same names, dtypes and shapes."""
    new = stored.quantize(key, matrix)
    assert set(new) == set(stored.matrices[key].parts)
    for name, tensor in new.items():
        if "quant_state" not in name:
            assert TensorInfo.of(tensor) == source.tensors[name]
    again = type(stored)(stored.config, source.tensors, stored.dense, lambda name: read(new, source, name))
    error = (again.dequantize(key).float() - matrix.float()).norm() / matrix.float().norm()
    assert error < bound


def test_fp8_blocks(llama: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    _, base = llama
    state = base.state_dict()
    torch.manual_seed(1)
    codes, scales = torch.randn(64, 128).to(torch.float8_e4m3fn), torch.rand(2, 3) + 0.1
    state[KEY], state[f"{KEY}_scale_inv"] = codes, scales
    config = {**base.config.to_dict(), "quantization_config": {"quant_method": "fp8", "weight_block_size": [48, 48]}}
    save_folder(tmp_path, state, config)
    with Checkpoint(tmp_path) as source:
        stored = open_format(source, base)
        found = stored.dequantize(KEY)
        for i, j in ((0, 0), (47, 48), (48, 95), (63, 127)):
            assert found[i, j] == codes[i, j].float() * scales[i // 48, j // 48]
        new = stored.quantize(KEY, found)
        assert {name: TensorInfo.of(tensor) for name, tensor in new.items()} == {
            name: source.tensors[name] for name in stored.matrices[KEY].parts
        }
        assert new[KEY].float().abs().amax() == torch.finfo(torch.float8_e4m3fn).max
        check_same_after_quantizing(stored, source, KEY, found, 0.03)


def save_folder(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, default=str))


@pytest.mark.parametrize("build", [GPT2LMHeadModel, LlamaForCausalLM], ids=["Conv1D", "Linear"])
def test_normal_float(build: Callable[[Any], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    size: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    gpt2 = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16)

    def make() -> Any:
        return build(gpt2 if build is GPT2LMHeadModel else LlamaConfig(vocab_size=64, **size))

    targets = ["c_attn", "c_proj"] if build is GPT2LMHeadModel else ["q_proj", "down_proj"]
    base = make()
    model = standalone(get_peft_model(make(), LqLoraConfig(r=4, target_modules=targets)))
    model.save_pretrained(tmp_path)
    dense = model.dequantize()
    with Checkpoint(tmp_path) as source:
        stored = open_format(source, base)
        assert len(stored.matrices) == len([name for name in source.tensors if name.endswith(".codes")]) >= 2
        for key in stored.matrices:
            assert torch.allclose(stored.dequantize(key), dense.get_parameter(key).detach(), atol=1e-6)
            check_same_after_quantizing(stored, source, key, stored.dequantize(key))


def test_what_does_not_fit_is_named(llama: tuple[Path, LlamaForCausalLM]) -> None:
    _, base = llama
    tensors = {
        KEY: TensorInfo(torch.int8, (64, 128)),
        KEY.replace("weight", "SCB"): TensorInfo(torch.float32, (63,)),
    }
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(ValueError, match="SCB"):
        stored_format(config, tensors, dense_tensors(base), lambda name: torch.empty(0))
    with pytest.raises(ValueError, match=r"down_proj\.weight"):
        stored_format(config, {name: tensors[name] for name in tensors if name != KEY}, dense_tensors(base), torch.load)


def test_unknown_formats_are_none() -> None:
    assert stored_format({"quant_method": "gptq"}, {}, {}, torch.load) is None
    assert stored_format({}, {}, {}, torch.load) is None
