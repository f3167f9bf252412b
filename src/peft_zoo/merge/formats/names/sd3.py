"""Module names of the transformers of Stable Diffusion 3 and 3.5: of diffusers, and of the original code."""

from __future__ import annotations

from collections.abc import Iterator

from peft_zoo.merge.formats.names.table import Counts, Pair, Templates, expand, swapped, swapped_if_short, under

_ENDS: Templates = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
}
_BLOCK: Templates = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": swapped_if_short("norm1_context.linear"),
}


def sd3_pairs(counts: Counts) -> Iterator[Pair]:
    """Yields the pairs of a transformer of Stable Diffusion 3; some of its modules may not exist."""
    yield from expand(_ENDS)
    yield from expand(under("joint_blocks.{i}", "transformer_blocks.{i}", _BLOCK), counts("num_layers"))
