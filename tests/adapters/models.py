"""Tiny real architectures, built from configurations without a download, and helpers for every adapter test."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
import transformers
from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import peft_zoo
from peft_zoo import registration
from peft_zoo.adapters.base import ZooModel

# A method that extends peft's LoRA uses peft's own layers, which peft's own test-suite covers.
METHODS = [method for method in peft_zoo.methods().values() if issubclass(method.tuner_cls, ZooModel)]
VOCABULARY = 40
WIDE = {"initializer_range": 0.3}  # so that a change in one layer is well above rounding in the output
STILL = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def spread(values: Iterable[Any], shift: int = 0) -> list[Any]:
    """Rows (method, value) for `parametrize`: enough for each method and each value to occur; the others are `full`.

    Args:
        values: Second element of the rows; its text is the id.
        shift: Changes which value meets which method, so that the tests of a file have different pairs.
    """
    values = list(values)
    quick = {((i + shift) % len(METHODS), i % len(values)) for i in range(max(len(METHODS), len(values)))}
    return [
        pytest.param(
            method, value, id=f"{method.name}-{value}", marks=[] if (row, column) in quick else [pytest.mark.full]
        )
        for row, method in enumerate(METHODS)
        for column, value in enumerate(values)
    ]


@dataclass(frozen=True)
class Architecture:
    """A model to build, an input for it, and the names of the modules to adapt."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: tuple[str, ...]


def _tokens(batch: int = 3, length: int = 5) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def _text() -> dict[str, Tensor]:
    return {"input_ids": _tokens(), "attention_mask": torch.ones(3, 5, dtype=torch.long)}


def _text_to_text() -> dict[str, Tensor]:
    return {**_text(), "decoder_input_ids": _tokens(3, 4)}


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def _diffusion() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 3, 8, 8, generator=generator),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 4, 8, generator=generator),
    }


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(**WIDE, **TEXT, **SMALL, intermediate_size=24, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        **WIDE, **TEXT, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config)


def _opt() -> nn.Module:
    config = transformers.OPTConfig(
        **TEXT, **SMALL, init_std=0.3, word_embed_proj_dim=16, ffn_dim=24, max_position_embeddings=32, dropout=0
    )
    return transformers.OPTForCausalLM(config)


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        **WIDE, **SMALL, **STILL, vocab_size=VOCABULARY, intermediate_size=24, max_position_embeddings=16
    )
    return transformers.BertForSequenceClassification(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        **WIDE, **SMALL, **STILL, intermediate_size=24, image_size=8, patch_size=4, num_labels=3
    )
    return transformers.ViTForImageClassification(config)


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=2,
    )


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        **WIDE,
        **TEXT,
        **SMALL,
        intermediate_size=12,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    return transformers.MixtralForCausalLM(config)


ARCHITECTURES = {
    "llama": Architecture(_llama, _text, ("q_proj", "down_proj")),
    "gpt2": Architecture(_gpt2, _text, ("c_attn", "mlp.c_proj")),
    "opt": Architecture(_opt, _text, ("k_proj", "fc1")),
    "bert": Architecture(_bert, _text, ("query", "word_embeddings")),
    "t5": Architecture(_t5, _text_to_text, ("q", "wo")),
    "vit": Architecture(_vit, _pixels, ("q_proj", "projection")),
    "unet": Architecture(_unet, _diffusion, ("to_q", "conv1")),
    "mixtral": Architecture(_mixtral, _text, ("o_proj",)),
}


@functools.cache
def _original(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ARCHITECTURES[name].build().eval()


def fresh(name: str) -> nn.Module:
    """A new copy of an architecture, the same weights each time."""
    return copy.deepcopy(_original(name))


def config(method: peft_zoo.Method, **changes: Any) -> Any:
    """A configuration with a small rank and a random update, so that a new adapter changes the output."""
    known = {field.name for field in fields(method.config_cls)}
    general = {"r": 4, "init_weights": False}
    return method.config_cls(**{key: value for key, value in general.items() if key in known} | changes)


def adapted(method: peft_zoo.Method, name: str, model: nn.Module | None = None, **changes: Any) -> Any:
    """A `PeftModel` of an architecture, in evaluation mode."""
    changes = {"target_modules": list(ARCHITECTURES[name].targets)} | changes
    return get_peft_model(fresh(name) if model is None else model, config(method, **changes)).eval()


def inputs(name: str) -> dict[str, Tensor]:
    """A batch for an architecture, the same each time."""
    return ARCHITECTURES[name].inputs()


# transformers 5.23 renamed what it called gradient checkpointing.
CHECKPOINTING = (
    "activation" if hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable") else "gradient"
) + "_checkpointing"


def enable_checkpointing(model: Any, reentrant: bool) -> None:
    """Lets a `PeftModel` of transformers compute its activations anew in the backward pass."""
    base = model.base_model.model
    getattr(base, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
    base.enable_input_require_grads()


def first(result: Any) -> Tensor:
    """The first tensor of a model's output: logits, or a denoised sample."""
    return result if isinstance(result, Tensor) else (result.logits if "logits" in result else result[0])


@torch.no_grad()
def output(model: nn.Module, name: str) -> Tensor:
    """The output of a model for the architecture's batch."""
    return first(model(**inputs(name)))


class Wrapped(nn.Module):
    """A module that holds one layer, so that the layer can be replaced."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def wrap(method: peft_zoo.Method, layer: nn.Module, **changes: Any) -> Any:
    """A `PeftModel` around a single layer; reach the adapter layer as `.base_model.model.layer`."""
    return get_peft_model(Wrapped(layer), config(method, target_modules=["layer"], **changes)).eval()


def layers(model: nn.Module) -> list[Any]:
    """The adapted layers of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaN equals NaN and 0 differs from -0."""
    return tensor.detach().flatten().view(torch.uint8).clone()


def state(model: nn.Module) -> dict[str, Any]:
    """The module tree, the parameters with `requires_grad`, buffers, configurations and the active adapter."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, bits(p).tolist()) for name, p in model.named_parameters()],
        "buffers": [(name, bits(b).tolist()) for name, b in model.named_buffers()],
        "configs": copy.deepcopy(getattr(model, "peft_config", None)),
        "active": getattr(model, "active_adapter", None),
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Asserts that the block leaves a model exactly as it was."""
    before = state(model)
    yield
    after = state(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key] == value, key


def forget(name: str) -> None:
    """Removes a method that a test has registered from peft's registry and ours."""
    value = registration._methods.pop(name).peft_type
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        del mapping[value]
    for table in (PeftType._member_map_, PeftType._value2member_map_):
        del table[value]
    for names in (PeftType._member_names_, getattr(PeftType, "_hashable_values_", [value])):
        names.remove(value)
    type.__delattr__(PeftType, value)


def is_adapter(name: str, config: PeftConfig) -> bool:
    """Whether a parameter's name is that of an adapter of this type."""
    return f"{config.peft_type.value.lower()}_" in name


def check_against_definition(layer: Any, x: Tensor, delta: Tensor, *, output: float, gradients: float) -> None:
    """Compares a linear layer's output and all gradients with those of its base layer and an update ΔW (out, in).

    Args:
        layer: Adapted linear layer with one active adapter.
        x: Input of the layer that requires a gradient.
        delta: ΔW by the definition, `(out, in)`, differentiable in the layer's parameters.
        output: Relative and absolute tolerance of the output.
        gradients: Tolerance of each gradient, relative and as a share of its largest entry.
    """
    trained = [p for p in layer.parameters() if p.requires_grad]
    outcome, expected = layer(x), layer.base_layer(x) + x @ delta.t()
    torch.testing.assert_close(outcome, expected, rtol=output, atol=output)
    weights = torch.randn_like(outcome)
    got = torch.autograd.grad((outcome * weights).sum(), [x, *trained])
    wanted = torch.autograd.grad((expected * weights).sum(), [x, *trained])
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=gradients, atol=gradients * w.abs().max().item())
