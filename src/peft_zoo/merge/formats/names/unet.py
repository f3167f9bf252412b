"""Module names of the UNets of Stable Diffusion 1, 2 and XL: those of diffusers, and those of the original code.

With L layers in a block, block i of the way down begins at `input_blocks.{(L+1) i + 1}`, and block i of the way up at
`output_blocks.{(L+1) i}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft_zoo.common.checks import check
from peft_zoo.merge.formats.names.table import Pair, Templates, expand, under

MOST_LAYERS = 32
"""Limit on the numbers of blocks, of layers in one, and of transformer blocks in a layer."""

SD: dict[str, Any] = {
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SDXL: dict[str, Any] = {
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
}

_ENDS: Templates = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}
_RESNET: Templates = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION: Templates = {name: name for name in ("proj_in", "proj_out")}
_LAYER: Templates = {
    f"transformer_blocks.{{i}}.{name}": f"transformer_blocks.{{i}}.{name}"
    for name in (
        *(f"{attn}.{part}" for attn in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")),
        "ff.net.0.proj",
        "ff.net.2",
    )
}


def unet_pairs(config: Mapping[str, Any]) -> Iterator[Pair]:
    """Yields the pairs of a UNet with a configuration of diffusers; some of its modules may not exist."""
    layers = config.get("layers_per_block", 2)
    check(
        type(layers) is int and 0 < layers <= MOST_LAYERS, "layers_per_block", layers, "UNets of one number are known"
    )
    down, up = _types(config, "down_block_types"), _types(config, "up_block_types")
    depths = config.get("transformer_layers_per_block", 1)
    depths = depths if isinstance(depths, list) else [depths] * len(down)
    fits = len(depths) == len(down) and all(type(depth) is int and 0 < depth <= MOST_LAYERS for depth in depths)
    check(fits, "transformer_layers_per_block", depths, "give an int, or one for each block of the way down")
    yield from expand(_ENDS)
    for i, kind in enumerate(down):
        for j in range(layers):
            file, model = f"input_blocks.{(layers + 1) * i + j + 1}", f"down_blocks.{i}"
            yield from _layer(
                file, f"{model}.resnets.{j}", f"{model}.attentions.{j}", depths[i] if "Attn" in kind else 0
            )
        if i < len(down) - 1:
            yield Pair(f"input_blocks.{(layers + 1) * (i + 1)}.0.op", (f"down_blocks.{i}.downsamplers.0.conv",))
    yield from expand(under("middle_block.0", "mid_block.resnets.0", _RESNET))
    yield from _attention("middle_block.1", "mid_block.attentions.0", depths[-1])
    yield from expand(under("middle_block.2", "mid_block.resnets.1", _RESNET))
    for i, kind in enumerate(up):
        depth = depths[-1 - i] if "Attn" in kind else 0
        for j in range(layers + 1):
            file, model = f"output_blocks.{(layers + 1) * i + j}", f"up_blocks.{i}"
            yield from _layer(file, f"{model}.resnets.{j}", f"{model}.attentions.{j}", depth)
        if i < len(up) - 1:
            file = f"output_blocks.{(layers + 1) * i + layers}.{2 if depth else 1}.conv"
            yield Pair(file, (f"up_blocks.{i}.upsamplers.0.conv",))


def _types(config: Mapping[str, Any], field: str) -> list[str]:
    """Returns the types of blocks after checking that they are those of these UNets."""
    types = config.get(field)
    known = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")
    fits = isinstance(types, list) and 0 < len(types) <= MOST_LAYERS and all(kind in known for kind in types)
    check(fits, field, types, f"blocks of the types {', '.join(known)} are known")
    return list(types or [])


def _layer(file: str, resnet: str, attention: str, depth: int) -> Iterator[Pair]:
    """Yields the pairs of a residual layer and the attention after it; `depth` is 0 without attention."""
    yield from expand(under(f"{file}.0", resnet, _RESNET))
    if depth:
        yield from _attention(f"{file}.1", attention, depth)


def _attention(file: str, model: str, depth: int) -> Iterator[Pair]:
    """Yields the pairs of an attention of `depth` transformer blocks."""
    yield from expand(under(file, model, _ATTENTION))
    yield from expand(under(file, model, _LAYER), depth)
