"""Small models with trained LoRAs, their files, and their best approximations of lower rank."""

from __future__ import annotations

import copy
import itertools
import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ALL = ["words", "linear", "conv1", "conv2", "conv3"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"linear": 4, "conv2": 8}, "alpha_pattern": {"linear": 3, "words": 10}},
    "transposed": {"target_modules": ["transposed"], "fan_in_fan_out": True},
    "bias": {"target_modules": ["linear", "conv1", "conv2"], "lora_bias": True},
    "negative": {"lora_alpha": -9},
    "dora": {"use_dora": True},
    "dora of rank 3": {"use_dora": True, "true_rank": 3},
}
R = 6
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Layers(nn.Module):
    """A chain of one layer of each kind that LoRA adapts, and a head that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12)
        self.linear = nn.Linear(12, 10)
        self.transposed = Conv1D(12, 10)
        self.conv1 = nn.Conv1d(12, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 8, (3, 2))
        self.conv3 = nn.Conv3d(2, 6, (1, 2, 3))
        self.head = nn.Linear(24, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `(batch, 6)` to `(batch, 3)`."""
        x = self.transposed(self.linear(self.words(tokens)).tanh())
        x = self.conv2(self.conv1(x.mT).tanh().reshape(-1, 4, 3, 4)).tanh()
        return self.head(self.conv3(x.reshape(-1, 2, 1, 3, 4)).flatten(1))


_MADE: dict[str, Any] = {}  # to be copied: making a model takes peft ten times as long
TOKENS = torch.randint(20, (16, 6), generator=torch.Generator().manual_seed(1))


def base() -> Layers:
    """The model, the same each time."""
    if "base" not in _MADE:
        with torch.random.fork_rng():  # what a test draws does not depend on what was made before
            torch.manual_seed(0)
            _MADE["base"] = Layers()
    return copy.deepcopy(_MADE["base"])


def adapted(config_cls: type[LoraConfig] = LoraConfig, *, true_rank: int | None = None, **fields: Any) -> PeftModel:
    """The model with a LoRA that looks trained, R = 6 and scale 2 unless said otherwise."""
    key = repr((config_cls, true_rank, sorted(fields.items())))
    if key not in _MADE:
        with torch.random.fork_rng():
            wanted = config_cls(**{"r": R, "lora_alpha": 2 * R, "target_modules": ALL, **fields})
            model = get_peft_model(base(), wanted)
        train(model, true_rank=true_rank)
        _MADE[key] = model.eval()
    return copy.deepcopy(_MADE[key])


@torch.no_grad()
def train(model: nn.Module, adapter: str = "default", true_rank: int | None = None, seed: int = 3) -> None:
    """Gives an adapter factors whose singular values fall, to zero after `true_rank`; those of B are far larger."""
    generator = torch.Generator().manual_seed(seed)
    for layer, ratio in zip(layers(model, adapter).values(), itertools.cycle((0.5, 0.3, 0.8, 0.6, 0.4))):
        if adapter in layer.lora_embedding_A:
            A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        else:
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        rank = len(A)
        falling = torch.tensor([ratio**k if true_rank is None or k < true_rank else 0.0 for k in range(rank)])
        mix = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
        size = 0.1 / math.sqrt(A[0].numel())
        A.copy_(size * (mix @ torch.randn(rank, A[0].numel(), generator=generator)).reshape(A.shape))
        B.copy_(6 * ratio * (torch.randn(len(B), rank, generator=generator) * falling @ mix.T).reshape(B.shape))
        if getattr(dict(layer.lora_B).get(adapter), "bias", None) is not None:
            layer.lora_B[adapter].bias.normal_(generator=generator)
        if adapter in layer.lora_magnitude_vector:
            weight = layer.lora_magnitude_vector[adapter].weight
            weight.mul_(1 + 0.2 * torch.rand(weight.shape, generator=generator))
    for name, parameter in model.named_parameters():  # the head, trained tokens
        if f"modules_to_save.{adapter}" in name or f"trainable_tokens_delta.{adapter}" in name:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def saved(folder: Path, model: PeftModel | None = None, /, **fields: Any) -> Path:
    """A folder that peft saved a model's adapters into, or that of `adapted`."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.filterwarnings("ignore", ".*invalid shape")  # peft takes the bias of B for a shard
        patch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)  # takes longer than everything else
        (model or adapted(**fields)).save_pretrained(str(folder))
    return folder


def loaded(folder: Path) -> PeftModel:
    """Model that stock peft loads from a folder."""
    return PeftModel.from_pretrained(base(), str(folder)).eval()


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model(TOKENS)


def layers(model: nn.Module, adapter: str = "default") -> dict[str, LoraLayer]:
    """The adapted layers, by the names of their modules in the base model."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
    return {name.removeprefix("base_model.model."): layer for name, layer in found if adapter in layer.scaling}


def best(update: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank of a weight's update, by the definition."""
    U, S, Vh = torch.linalg.svd(update.double().flatten(1), full_matrices=False)
    return (U[:, :rank] * S[:rank] @ Vh[:rank]).reshape(update.shape).to(update.dtype)


def best_error(update: Tensor, rank: int) -> float:
    """Relative error of the best approximation."""
    S = torch.linalg.svdvals(update.detach().double().flatten(1))
    return float(S[rank:].norm() / S.norm())


@torch.no_grad()
def optimum(model: PeftModel, ranks: Mapping[str, int], adapter: str = "default") -> nn.Module:
    """The base model with the best update of each rank in its weights: what a compressed adapter should do."""
    merged = base().eval()
    for name, layer in layers(model, adapter).items():
        module: Any = merged.get_submodule(name)
        module.weight += best(layer.get_delta_weight(adapter), ranks[name])  # type: ignore[operator]
        bias = getattr(dict(layer.lora_B).get(adapter), "bias", None)
        if bias is not None:
            module.bias += layer.scaling[adapter] * bias
    return merged


def updates(tensors: Mapping[str, Tensor], scale: Callable[[str], float]) -> dict[str, Tensor]:
    """Updates of the modules of a single file, dense and in float64, from the formats' definition."""
    result = {}
    pairs = (("lora_down", "lora_up"), ("lora.down", "lora.up"), ("lora_A", "lora_B"))
    for down, up in ((f".{down}.weight", f".{up}.weight") for down, up in pairs):
        for name in (key.removesuffix(down) for key in tensors if key.endswith(down)):
            A, B = tensors[name + down].double().flatten(1), tensors[name + up].double().flatten(1)
            result[name] = scale(name) * B @ A
    return result


def factors(name: str, down: str, up: str, shape: tuple[int, ...], rank: int, **changes: Any) -> dict[str, Tensor]:
    """The tensors of a module with a weight of `shape` (out, in, *kernel), as trainers of image models name them."""
    options = {"dtype": torch.float32, "seed": 0, **changes}
    generator = torch.Generator().manual_seed(options["seed"])
    A = torch.randn(rank, *shape[1:], generator=generator) / math.sqrt(math.prod(shape[1:]))
    B = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
    B *= torch.tensor([0.5**k for k in range(rank)]).reshape(1, -1, *(1 for _ in shape[2:]))
    return {f"{name}.{down}": A.to(options["dtype"]), f"{name}.{up}": B.to(options["dtype"])}


def kohya(rank: int = 4, **changes: Any) -> dict[str, Tensor]:
    """A linear layer, a convolution and a text encoder's layer, as sd-scripts stores them, without alpha."""
    shapes = {"lora_unet_to_q": (10, 8), "lora_unet_conv": (6, 4, 3, 3), "lora_te_q_proj": (7, 9)}
    found: dict[str, Tensor] = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        found |= factors(name, "lora_down.weight", "lora_up.weight", shape, rank, seed=seed, **changes)
    return found


def single(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A file of tensors."""
    save_file(dict(tensors), path, metadata)
    return path


def content(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file."""
    with safe_open(path if path.is_file() else path / WEIGHTS, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def factor(folder: Path, name: str) -> Tensor:
    """A factor in a folder as a matrix, `linear.lora_A`."""
    return content(folder)[0][f"base_model.model.{name}.weight"].flatten(1)


def product(folder: Path, name: str) -> Tensor:
    """B A of a module in a folder, without its scale, in float64."""
    return factor(folder, f"{name}.lora_B").double() @ factor(folder, f"{name}.lora_A").double()


def config(folder: Path) -> dict[str, Any]:
    """The configuration in a folder."""
    return json.loads((folder / CONFIG).read_text())


def ranks(report: Any) -> dict[str, int]:
    """New ranks by module."""
    return {module.name: module.new_rank for module in report.modules}


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a failed call must leave alone: tensors, flags, configurations."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: (parameter.requires_grad, id(parameter)) for name, parameter in model.named_parameters()}
    known = {
        name: {field: copy.copy(getattr(layer, field)) for field in ("r", "scaling", "lora_alpha", "use_rslora")}
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    active = {name: layer.active_adapters for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    configs = {name: copy.deepcopy(config.to_dict()) for name, config in getattr(model, "peft_config", {}).items()}
    return {"tensors": tensors, "flags": flags, "layers": known, "active": active, "configs": configs}


def same_state(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether nothing changed, to the last bit."""
    tensors = before["tensors"].keys() == after["tensors"].keys() and all(
        torch.equal(value, after["tensors"][name]) for name, value in before["tensors"].items()
    )
    return tensors and all(before[part] == after[part] for part in ("flags", "layers", "active", "configs"))
