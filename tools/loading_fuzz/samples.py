"""Valid folders to mutate: a plain LoRA, an adapter of each registered method, a quantized model and a recipe.

Models are tiny. A method needs no entry here: its adapter is made from `Config.conformance`, as for peft's own tests,
and all of its trained parameters get random values.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_zoo

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MODEL = ("config.json", "model.safetensors")
TARGETS = ("q_proj", "down_proj")
RANK = 4
TOKENS = torch.arange(16).view(2, 8) * 7 % 40
NOISE = 0.3


@dataclass(frozen=True)
class Sample:
    """A valid folder and the model that it belongs to.

    Attributes:
        name: Name of the method, or what it is.
        folder: Folder on disk.
        files: Names of its configuration and of its weights file.
        base: Model without the adapter, in evaluation mode.
        run: Function from a model to its output.
        part: Entry of the configuration that is the sample's; all of it by default.
        embedded: Entry of the safetensors header that holds the configuration too; none by default.
        kinds: Modules of `mutations` that apply; all by default.
    """

    name: str
    folder: Path
    files: tuple[str, str]
    base: nn.Module
    run: Callable[[Any], Tensor]
    part: str = ""
    embedded: str = ""
    kinds: tuple[str, ...] = ()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Output of a language model."""
    return model(input_ids=TOKENS).logits


@torch.no_grad()
def prediction(model: Any) -> Tensor:
    """Output of a denoiser."""
    sample = torch.linspace(-1, 1, 4 * 8 * 8).view(1, 4, 8, 8)
    return model(sample, torch.tensor([500]), torch.linspace(-1, 1, 3 * 8).view(1, 3, 8)).sample


@functools.cache
def language_model() -> nn.Module:
    """A Llama of two layers, 16 wide, with the same weights each time."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    with seeded():
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **special, initializer_range=0.2)).eval()


@functools.cache
def denoiser() -> nn.Module:
    """A U-Net with cross attention."""
    from diffusers import UNet2DConditionModel

    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"in_channels": 4, "out_channels": 4, "block_out_channels": (8,), "layers_per_block": 1}
    rest = {"sample_size": 8, "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 2}
    with seeded():
        return UNet2DConditionModel(**blocks, **sizes, **rest).eval()


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Runs a block from a fixed random state, restored afterwards, with warnings silenced."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield


def trained(base: nn.Module, config: PeftConfig, seed: int = 1) -> Any:
    """Returns a copy of `base` with an adapter whose trained parameters have random values."""
    with seeded(seed), torch.no_grad():
        model = get_peft_model(copy.deepcopy(base), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += NOISE * torch.randn_like(parameter)
    return model.eval()


def config_of(config_cls: type[PeftConfig], **changes: Any) -> PeftConfig:
    """Returns a small configuration of a method for `language_model`."""
    arguments = getattr(config_cls, "conformance", None)
    fields = {"r": RANK, **(dict(arguments.arguments) if arguments else {})}
    return config_cls(**{**fields, "target_modules": list(TARGETS), **changes})


def save(model: Any, folder: Path) -> Path:
    """Saves an adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))
    return folder


def adapter(root: Path, name: str, config: PeftConfig) -> Sample:
    """Saves a trained adapter of `language_model`."""
    base = language_model()
    return Sample(name, save(trained(base, config), root / name), ADAPTER, base, logits)


def adapters(root: Path) -> list[Sample]:
    """Samples of a plain LoRA and of every registered method that has weights."""
    found = [adapter(root, "lora", config_of(LoraConfig))]
    for method in peft_zoo.methods().values():
        if method.trainable:
            found.append(adapter(root, method.name, config_of(method.config_cls)))
    return found


def convertible(root: Path) -> list[Sample]:
    """Samples for the file tools that need a variant: an LQ-LoRA with its initial factors, and peft's RandLoRA."""
    from peft_zoo import LqLoraConfig

    return [
        adapter(root, "lq_lora_kept", config_of(LqLoraConfig, keep_init=True)),
        adapter(root, "peft_randlora", config_of(peft.RandLoraConfig)),
    ]


def quantized_model(root: Path) -> Sample:
    """Sample of a quantized model without peft."""
    from peft_zoo import LqLoraConfig
    from peft_zoo.lq_lora import standalone

    model = standalone(trained(language_model(), config_of(LqLoraConfig)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(root / "quantized_model"))
    return Sample("quantized_model", root / "quantized_model", MODEL, language_model(), logits, "quantization_config")


def recipe(root: Path) -> Sample:
    """Sample of a recipe of two LoRAs of a denoiser, which lie in its folder."""
    from peft_zoo import CachedLoraConfig

    folder = root / "recipe"
    for name, seed in (("one", 2), ("two", 3)):
        config = LoraConfig(r=RANK, target_modules=["to_q", "to_v"])
        save(trained(denoiser(), config, seed), folder / name)
    sources = {name: str(folder / name) for name in ("one", "two")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CachedLoraConfig(adapters=sources, weights={"one": 0.75, "two": 0.5}, method="merge").save_pretrained(
            str(folder)
        )
    return Sample("recipe", folder, ADAPTER, denoiser(), prediction)
