"""Module names of the transformers of HunyuanVideo: those of diffusers, and those of the original code."""

from __future__ import annotations

from collections.abc import Iterator

from peft_zoo.merge.formats.names.table import Counts, Pair, Templates, expand, fused, swapped, under

_ENDS: Templates = {
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
    **under(
        "txt_in",
        "context_embedder",
        {
            "input_embedder": "proj_in",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "c_embedder.linear_1": "time_text_embed.text_embedder.linear_1",
            "c_embedder.linear_2": "time_text_embed.text_embedder.linear_2",
        },
    ),
}
_REFINER: Templates = {
    "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE: Templates = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": "attn.to_out.0",
    "txt_attn_proj": "attn.to_add_out",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
    "img_mod.linear": "norm1.linear",
    "txt_mod.linear": "norm1_context.linear",
}
_SINGLE: Templates = {
    "linear1": fused(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), (1, 1, 1, 4)),
    "linear2": "proj_out",
    "modulation.linear": "norm.linear",
}


def hunyuan_pairs(counts: Counts) -> Iterator[Pair]:
    """Yields the pairs of a transformer of HunyuanVideo."""
    yield from expand(_ENDS)
    refiner = under(
        "txt_in.individual_token_refiner.blocks.{i}", "context_embedder.token_refiner.refiner_blocks.{i}", _REFINER
    )
    yield from expand(refiner, counts("num_refiner_layers"))
    yield from expand(under("double_blocks.{i}", "transformer_blocks.{i}", _DOUBLE), counts("num_layers"))
    single = under("single_blocks.{i}", "single_transformer_blocks.{i}", _SINGLE)
    yield from expand(single, counts("num_single_layers"))
