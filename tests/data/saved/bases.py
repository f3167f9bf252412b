"""Tiny models and inputs with all values computed from integers, so that no file has to store them.

Shared by `make.py`, which wrote the files of this folder, and by the test that reads them. Nothing here is of peft-zoo.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

__all__: list[str] = []


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Float32 numbers in (-scale, scale), the same bits everywhere: integers are mixed, then divided by 128.

    Args:
        *shape: Of the tensor.
        seed: Another one gives other numbers.
        scale: A power of two, so that nothing is rounded.
    """
    mixed = torch.arange(math.prod(shape), dtype=torch.int64) + 1_000_003 * (seed + 1)
    for factor, shift in ((2_654_435_761, 15), (2_246_822_519, 13)):
        mixed = mixed * factor % 2**32
        mixed = mixed ^ (mixed >> shift)
    return ((mixed % 255 - 127).float() / 128 * scale).reshape(shape)


@torch.no_grad()
def filled(model: Any, scale: float = 0.25, seed: int = 0) -> Any:
    """The model in evaluation mode, with these numbers in all its matrices and zeros in its biases."""
    for place, parameter in enumerate(model.parameters()):
        if parameter.dim() > 1:
            parameter.copy_(numbers(*parameter.shape, seed=seed + place, scale=scale))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    return model.eval()


class Net(nn.Module):
    """An embedding, a linear layer and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin, self.conv = nn.Embedding(20, 16), nn.Linear(16, 12), nn.Conv1d(12, 8, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `(batch, 6)` to `(batch, 8, 6)`."""
        return self.conv(self.lin(self.emb(tokens)).mT)


def net() -> Net:
    """A `Net`."""
    return filled(Net())


def llama() -> Any:
    """A Llama of one layer, 16 wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    return filled(LlamaForCausalLM(LlamaConfig(**sizes, **heads, **special, tie_word_embeddings=False)))


def vae() -> Any:
    """An `AutoencoderTiny` of factor 2."""
    from diffusers import AutoencoderTiny

    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return filled(AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)))


def unet() -> Any:
    """A U-Net with cross attention."""
    from diffusers import UNet2DConditionModel

    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    channels = {"in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1}
    rest = {"sample_size": 8, "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 2}
    return filled(UNet2DConditionModel(**blocks, **channels, **rest))


BASES = {"net": net, "llama": llama, "vae": vae, "unet": unet}
TOKENS = (numbers(4, 6, seed=1) * 128 + 127).long() % 20


def pictures(count: int, seed: int = 0, side: int = 32) -> Tensor:
    """Smooth blots with some noise, `(count, 3, side, side)` in [0, 1], in steps of 1/256."""
    coarse = numbers(count, 3, 4, 4, seed=100 + seed) * 64
    blots = coarse.repeat_interleave(side // 4, 2).repeat_interleave(side // 4, 3)
    noise = (numbers(count, 3, side, side, seed=200 + seed) * 32).round()
    return (128 + blots.round() + noise).clamp(0, 255) / 256


def inputs(base: str) -> tuple[Tensor, ...]:
    """Input for a model of `BASES`."""
    if base == "unet":
        return numbers(2, 4, 8, 8, seed=3), torch.tensor([500, 500]), numbers(2, 3, 8, seed=4)
    return (pictures(2),) if base == "vae" else (TOKENS,)


@torch.no_grad()
def output(model: Any, base: str) -> Tensor:
    """Output of the model for that input."""
    found = model(*inputs(base))
    return found if isinstance(found, Tensor) else next(found[k] for k in ("logits", "sample") if k in found)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Adapted layers by the names that they have in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name.removeprefix("base_model.model."), module


@torch.no_grad()
def observed(model: nn.Module, base: str, adapter: str = "default") -> dict[str, Tensor]:
    """Results of a model with an adapter: output, updates of a `Net`, quantized matrices."""
    found = {"output": output(model, base), **dense_bits(model)}
    if base == "net":
        found |= {f"delta.{name}": layer.get_delta_weight(adapter) for name, layer in adapted_layers(model)}
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def dense_bits(model: nn.Module) -> dict[str, Tensor]:
    """SHA-256 of each quantized matrix of a model when it is restored to float32."""
    return {
        f"sha256.{name}": sha256(module.dense()) for name, module in model.named_modules() if hasattr(module, "dense")
    }


def drawn() -> Tensor:
    """SHA-256 of what torch draws from a seed, which may change with its version."""
    generator = torch.Generator("cpu").manual_seed(5)
    return sha256(nn.init.kaiming_uniform_(torch.empty(4, 1, 16, dtype=torch.float16), generator=generator))


def sha256(tensor: Tensor) -> Tensor:
    """SHA-256 of a tensor's bytes, uint8 `(32,)`."""
    content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return torch.tensor([*hashlib.sha256(content).digest()], dtype=torch.uint8)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of tokens that are their own labels."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = (numbers(8, seed=50 + index) * 128 + 127).long() % 40
        return {"input_ids": row, "labels": row.clone()}


def trainer(model: Any, folder: Any, callbacks: list[Any], **changes: Any) -> Any:
    """A `transformers.Trainer` of eight steps that saves after the third."""
    from transformers import Trainer, TrainingArguments

    options = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.01, "save_steps": 3}
    quiet = {"logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(folder), **{**options, **quiet, **changes})
    return Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=callbacks)


class Reader(nn.Module):
    """A decoder of one's own for `WatermarkLoraConfig(decoder="custom")`: eight weighted sums of an image."""

    __module__ = "saved"  # wherever it is imported from: a checkpoint remembers it

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        self.register_buffer("weight", numbers(bits, 3 * 32 * 32, seed=9, scale=0.125))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, bits)` of images `(B, 3, 32, 32)`."""
        return (images - 0.5).flatten(1) @ self.weight.T
