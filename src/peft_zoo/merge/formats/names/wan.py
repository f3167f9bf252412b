"""Module names of the transformers of Wan 2: those of diffusers, and those of the original code."""

from __future__ import annotations

from collections.abc import Iterator

from peft_zoo.merge.formats.names.table import Counts, Pair, Templates, expand, under

_ENDS: Templates = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_BLOCK: Templates = {
    **{f"self_attn.{file}": f"attn1.{model}" for file, model in _ATTENTION.items()},
    **{f"cross_attn.{file}": f"attn2.{model}" for file, model in _ATTENTION.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


def wan_pairs(counts: Counts) -> Iterator[Pair]:
    """Yields the pairs of a transformer of Wan 2; some of its modules may not exist."""
    yield from expand(_ENDS)
    yield from expand(under("blocks.{i}", "blocks.{i}", _BLOCK), counts("num_layers"))
