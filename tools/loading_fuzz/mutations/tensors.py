"""Changes of keys, shapes, dtypes and values, in a valid weights file."""

from __future__ import annotations

import random

import torch

from loading_fuzz.drafts import Draft
from loading_fuzz.mutations.registry import mutation, some_key


@mutation
def missing_key(draft: Draft, rng: random.Random) -> None:
    """Tensors are missing: one, those of a layer, or all."""
    kind = rng.choice(("one", "one", "layer", "all"))
    key = some_key(draft, rng)
    for name in list(draft.tensors):
        if kind == "all" or name == key or (kind == "layer" and "layers.1." in name):
            draft.subjects.update(name.split(".")[-3:])
            del draft.tensors[name]


@mutation
def extra_key(draft: Draft, rng: random.Random) -> None:
    """A tensor of the base model, or of nothing, lies in the file."""
    names = (
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.o_proj.weight",
    )
    name = rng.choice((*names, "evil.weight", "model.layers.0.self_attn.q_proj.base_layer.weight", "x" * 1000))
    key = rng.choice(("base_model.model.", "", "base_model.")) + name
    shape = (16,) if "norm" in name else (16, 16) if "proj" in name else (40, 16)
    draft.tensors[key] = torch.full(shape, 9.0)
    draft.subjects.update((key, *key.split(".")[-3:]))


@mutation
def renamed_key(draft: Draft, rng: random.Random) -> None:
    """A key gets another name: no prefix, another layer, a wrong letter, an adapter's name inside."""
    key = some_key(draft, rng)
    if key is None:
        return
    last = key.rpartition(".")[2]
    names = (
        key.removeprefix("base_model.model."),
        key.replace("layers.0", "layers.7"),
        key.replace("lora_A", "lora_C") + "x",
        key.removesuffix(last) + "default." + last,
        key + "." + last,
        "base_model.model." + key,
        key.replace(".", "/", 1),
    )
    new = rng.choice(names)
    draft.tensors[new] = draft.tensors.pop(key)
    draft.subjects.update((new, *new.split(".")[-3:]))


@mutation
def prefix_stripped(draft: Draft, rng: random.Random) -> None:
    """All keys, or those of one kind of tensor, lose the prefix `base_model.model.`."""
    key = some_key(draft, rng) or ""
    part = rng.choice((key.rpartition(".")[2], ""))
    draft.tensors = {_bare(name) if part in name else name: tensor for name, tensor in draft.tensors.items()}


def _bare(key: str) -> str:
    return key.removeprefix("base_model.model.")


@mutation
def doubled_key(draft: Draft, rng: random.Random) -> None:
    """A tensor occurs under two keys that a loader may take for the same."""
    key = some_key(draft, rng)
    if key is not None:
        tensor = draft.tensors[key]
        draft.tensors[_bare(key) if key != _bare(key) else f"base_model.model.{key}"] = torch.zeros_like(tensor)


@mutation
def reshaped(draft: Draft, rng: random.Random) -> None:
    """A tensor has another shape."""
    key = some_key(draft, rng)
    if key is None:
        return
    tensor = draft.tensors[key]
    shapes = [tensor.flatten(), tensor[None], tensor.new_zeros(0, 4), tensor.new_zeros(3, 5), tensor.new_zeros(())]
    if tensor.dim() > 1:
        shapes += [tensor.mT.contiguous(), tensor[:-1], tensor[..., :-1]]
    draft.tensors[key] = rng.choice(shapes)


@mutation
def cast(draft: Draft, rng: random.Random) -> None:
    """One tensor, or all, have another dtype."""
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.int64, torch.uint8)
    dtype, key = rng.choice((*dtypes, torch.bool)), some_key(draft, rng)
    everything = rng.random() < 0.5
    for name, tensor in draft.tensors.items():
        if name == key or (everything and tensor.is_floating_point()):
            draft.tensors[name] = tensor.to(dtype)


@mutation
def value(draft: Draft, rng: random.Random) -> None:
    """One element is not finite, or very large, or another number."""
    key = some_key(draft, rng)
    if key is None or not draft.tensors[key].numel():
        return
    tensor = draft.tensors[key].clone()
    place = rng.randrange(tensor.numel())
    new = rng.choice((float("nan"), float("inf"), float("-inf"), 100.0, 0.5, -2.0))
    if not tensor.is_floating_point():
        new = rng.choice((0, 1, 77, 127))
    tensor.view(-1)[place] = new
    draft.tensors[key] = tensor
