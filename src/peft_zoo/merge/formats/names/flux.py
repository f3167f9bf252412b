"""Module names of the transformers of Flux.1: those of diffusers, and those of the original code."""

from __future__ import annotations

from collections.abc import Iterator

from peft_zoo.merge.formats.names.table import Counts, Pair, Templates, expand, fused, swapped, under

_ENDS: Templates = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
}
_DOUBLE: Templates = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
}
_SINGLE: Templates = {
    "linear1": fused(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), (1, 1, 1, 4)),
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
}


def flux_pairs(counts: Counts) -> Iterator[Pair]:
    """Yields the pairs of a transformer of Flux.1."""
    yield from expand(_ENDS)
    yield from expand(under("double_blocks.{i}", "transformer_blocks.{i}", _DOUBLE), counts("num_layers"))
    single = under("single_blocks.{i}", "single_transformer_blocks.{i}", _SINGLE)
    yield from expand(single, counts("num_single_layers"))
