r"""LoRAs of llama.cpp: GGUF files with the names of its models.

llama.cpp computes ``W x + alpha / r * B (A x)`` with one alpha for the whole file and r that of each tensor. So where
the products of scale and rank differ (rsLoRA, `rank_pattern`, `alpha_pattern`), B is multiplied by the difference::

    B' = B s r / alpha

Rows of q and k of Llama and Mistral are in another order there: in each head, row ``i`` of the first half of peft's
comes before row ``i`` of its second half. Factors are stored in float32, or in float16 if the adapter's are.

The names of a file do not say how many blocks and heads the model has, so `base` or `config` is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_zoo.common.checks import check
from peft_zoo.io import LoraAdapter, read_json
from peft_zoo.io.checkpoint import CONFIG
from peft_zoo.io.folder import open_regular
from peft_zoo.io.lora_settings import MAX_RANK
from peft_zoo.io.safetensors import check_finite
from peft_zoo.merge.base.plain_lora import Factors, Module, check_drop, drops, file_extras, write_plain_lora
from peft_zoo.merge.formats.format import ConvertOptions, Format, single

MAGIC = b"GGUF"
LAYERS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
MOST_BLOCKS = 4096


@dataclass(frozen=True)
class Architecture:
    """A family of models of llama.cpp.

    Attributes:
        name: Name in GGUF files.
        permutes: Whether rows of q and k are in another order than in transformers.
    """

    name: str
    permutes: bool = False


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", permutes=True),
    "MistralForCausalLM": Architecture("llama", permutes=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
}
"""Families that are tested with llama.cpp, by the class of transformers."""


@dataclass(frozen=True)
class Names:
    """Names of the modules of one model, and the order of their rows.

    Attributes:
        architecture: Its family.
        modules: Name in GGUF files by module.
        heads: Number of heads by the last part of q and k.
        is_tied: Whether the head is the embedding.
    """

    architecture: Architecture
    modules: Mapping[str, str]
    heads: Mapping[str, int]
    is_tied: bool

    def reordered(self, module: str, B: Tensor, order: Callable[[int, int], tuple[int, ...]]) -> Tensor:
        """Returns B with its rows in another order, where the family has one."""
        heads = self.heads.get(module.rpartition(".")[2])
        if not self.architecture.permutes or heads is None:
            return B
        if len(B) % (2 * heads):
            raise ValueError(f"{module}: {len(B)} rows are not those of {heads} heads; give the adapter's own base.")
        return B.reshape(order(heads, len(B) // heads // 2) + B.shape[1:]).transpose(1, 2).reshape(B.shape)


def _to_llama(heads: int, half: int) -> tuple[int, ...]:
    return heads, 2, half


def _from_llama(heads: int, half: int) -> tuple[int, ...]:
    return heads, half, 2


def names_of(options: ConvertOptions) -> Names:
    """Returns the names of the modules of the base model, from its configuration.

    Raises:
        ValueError: If it is missing or invalid.
        NotImplementedError: If the family of the model is not one that is tested.
    """
    if options.config is None and options.base is None:
        raise ValueError("base=None: a GGUF file does not describe the model; give base or config.")
    config: Mapping[str, Any] = options.config if options.base is None else read_json(Path(options.base, CONFIG))  # type: ignore[assignment]
    kinds = config.get("architectures")
    kind = kinds[0] if isinstance(kinds, list) and kinds else None
    if kind not in ARCHITECTURES:
        raise NotImplementedError(f"architectures={kinds!r}: use one of {', '.join(ARCHITECTURES)}, or merge.")
    sizes = {}
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        value = config.get(name, config.get("num_attention_heads"))
        check(type(value) is int and 0 < value <= MOST_BLOCKS, name, value, "config.json needs a positive integer")
        sizes[name] = value
    paths = [f"model.layers.{place}.{layer}" for place in range(sizes["num_hidden_layers"]) for layer in LAYERS]
    table = _package().get_tensor_name_map(_enumerated(kind), sizes["num_hidden_layers"])
    modules = {path: table.get_name(path) for path in (*paths, EMBEDDING, HEAD)}
    heads = {"q_proj": sizes["num_attention_heads"], "k_proj": sizes["num_key_value_heads"]}
    return Names(ARCHITECTURES[kind], modules, heads, bool(config.get("tie_word_embeddings", False)))


def _enumerated(kind: str) -> Any:
    """Returns the family as the package `gguf` names it."""
    return getattr(_package().MODEL_ARCH, ARCHITECTURES[kind].name.upper())


def _package() -> Any:
    """Returns the package `gguf`, which is optional."""
    try:
        import gguf
    except ImportError as error:
        raise NotImplementedError("GGUF files need the package gguf: pip install 'peft-zoo[tasks]'.") from error
    return gguf


def _is_alpha(value: float) -> bool:
    """Whether a value survives as the float32 of the file; llama.cpp takes 0 for "no alpha"."""
    return 1e-30 < abs(value) < 1e30


def _write(adapters: Mapping[str, LoraAdapter], target: Path, options: ConvertOptions) -> list[str]:
    """Writes the LoRA of a language model."""
    adapter = single(adapters, "gguf")
    names, config = names_of(options), adapter.config or {}
    extra_keys, notes = file_extras(adapter, config)
    check_drop(options.drop, adapter.modules, extra_keys)
    kept = [name for name in adapter.modules if not drops(name, options.drop)]
    for name in kept:
        if name not in names.modules:
            raise ValueError(f"{name}: llama.cpp has no tensor for it in this model; pass drop=[{name!r}], or merge.")
    if names.is_tied and HEAD in kept:
        raise ValueError(f"{HEAD}: it is tied to the embedding, so llama.cpp has no tensor for it; drop it, or merge.")
    alphas = {name: adapter.modules[name].scale * adapter.modules[name].rank for name in kept}
    for name, value in alphas.items():
        if not _is_alpha(value):
            scale = adapter.modules[name].scale
            raise ValueError(
                f"{name}: scale={scale} times the rank must be between 1e-30 and 1e30 in a GGUF file, where llama.cpp "
                f"takes 0 for no scale; pass drop=[{name!r}], or another lora_alpha."
            )
    alpha = alphas[kept[0]] if alphas[kept[0]] > 0 else 1.0
    gguf = _package()
    writer = gguf.GGUFWriter(str(target), names.architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for name in kept:
        B, A = adapter.factors(name)
        dtype = torch.float16 if B.dtype == A.dtype == torch.float16 else torch.float32
        B = names.reordered(name, B, _to_llama)
        B = B if alphas[name] == alpha else B.double() * (alphas[name] / alpha)
        A = A.mT if adapter.modules[name].kind == "embedding" else A
        for part, factor in (("a", A), ("b", B)):
            values = check_finite(f"{name}.lora_{part}", factor.to(dtype)).contiguous().numpy()
            writer.add_tensor(f"{names.modules[name]}.weight.lora_{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return list(notes)


def _read(path: Path, folder: Path, options: ConvertOptions) -> list[str]:
    """Writes a folder of peft."""
    names, (alpha, tensors) = names_of(options), _tensors(path)
    modules, factors = dict[str, Module](), dict[str, Factors]()
    for name, stem in names.modules.items():
        A, B = (tensors.pop(f"{stem}.weight.lora_{part}", None) for part in "ab")
        if A is None and B is None:
            continue
        if A is None or B is None:
            raise ValueError(f"{path}: {stem} has one factor only; get the file again.")
        A, B = check_finite(f"{stem}.lora_a", A), check_finite(f"{stem}.lora_b", B)
        A = A.mT.contiguous() if name == EMBEDDING else A
        if A.dim() != 2 or B.dim() != 2 or len(A) != B.shape[1] or not 0 < len(A) <= MAX_RANK:
            raise ValueError(f"{path}: the factors of {stem} are not those of one matrix; get the file again.")
        B = names.reordered(name, B, _from_llama)
        modules[name] = Module(name, "embedding" if name == EMBEDDING else "linear", (A.shape[1],), A.dtype)
        factors[name] = Factors(B.contiguous(), A, alpha / len(A))
    if tensors or not factors:
        odd = next(iter(tensors), "no tensor")
        raise ValueError(f"{path}: {odd!r} is of no module of this model; give its own base.")
    write_plain_lora(folder, {}, modules, factors, False)
    return []


def _tensors(path: Path) -> tuple[float, dict[str, Tensor]]:
    """Reads alpha and tensors of an adapter file, which is untrusted."""
    gguf = _package()
    try:
        reader = gguf.GGUFReader(str(path))
        fields = {key: reader.get_field(key) for key in ("general.type", "adapter.type", "adapter.lora.alpha")}
        values = {key: field.contents() for key, field in fields.items() if field is not None}
        kinds = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        tensors = {
            tensor.name: torch.from_numpy(tensor.data.copy()) if tensor.tensor_type in kinds else None
            for tensor in reader.tensors
        }
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError, MemoryError) as error:
        raise ValueError(f"{path}: not a valid GGUF file ({error}); get it again.") from error
    if (values.get("general.type"), values.get("adapter.type")) != ("adapter", "lora"):
        raise ValueError(f"{path}: a GGUF file of type {values.get('general.type')!r}, not a LoRA.")
    packed = next((name for name, tensor in tensors.items() if tensor is None), None)
    if packed is not None:
        raise NotImplementedError(f"{path}: {packed} is quantized; get the file in float32 or float16.")
    alpha: Any = values.get("adapter.lora.alpha")
    fits = isinstance(alpha, float) and _is_alpha(alpha)
    check(fits, "adapter.lora.alpha", alpha, "it must be a finite number that is not 0")
    return alpha, {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _owns(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    if not path.is_file():
        return False
    with open_regular(path) as file:
        return file.read(len(MAGIC)) == MAGIC


FORMAT = Format("gguf", "llama.cpp, Ollama", ".gguf", _write, _read, _owns)
