"""Module names of text encoders; files have the names of transformers."""

from __future__ import annotations

from peft_zoo.merge.formats.names.table import Templates, aliased

_CLIP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
_T5 = ("layer.0.SelfAttention.{}", "qkvo"), ("layer.1.DenseReluDense.{}", ("wi_0", "wi_1", "wi", "wo"))

# transformers 5 has the encoder of CLIPTextModel without `text_model` before it, and with it in the model that has a
# projection; earlier versions had both with it.
CLIP: Templates = {
    f"text_model.encoder.layers.{{i}}.{name}": aliased(
        f"encoder.layers.{{i}}.{name}", f"text_model.encoder.layers.{{i}}.{name}"
    )
    for name in _CLIP
}
CLIP_WITH_PROJECTION: Templates = {
    f"text_model.encoder.layers.{{i}}.{name}": f"text_model.encoder.layers.{{i}}.{name}" for name in _CLIP
}
T5: Templates = {
    name: name for stem, ends in _T5 for end in ends for name in [f"encoder.block.{{i}}.{stem.format(end)}"]
}
