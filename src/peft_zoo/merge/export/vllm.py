"""The rules of vLLM for a LoRA folder, without vLLM.

vLLM reads `r`, `lora_alpha`, `bias`, `modules_to_save`, `use_rslora` and `use_dora`, and nothing else of the
configuration: every module gets the scale `lora_alpha / r`, whatever the patterns say. Its loader knows keys that end
in `lora_A.weight`, `lora_B.weight`, `lora_embedding_A` and `lora_embedding_B`, and refuses a file with any other.

Source: `vllm/lora/peft_helper.py`, `vllm/lora/utils.py` and `vllm/config/lora.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft_zoo.io import Role, TensorFile, parse_key, read_json
from peft_zoo.io.lora_file import CONFIG_NAME, open_weights
from peft_zoo.io.lora_keys import FORMATS
from peft_zoo.io.lora_settings import read_settings

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's `--max-lora-rank` takes; 16 is the default."""
DEFAULT_RANK = 16
_LAYERS = (Role.A, Role.B)
_EMBEDDINGS = (Role.EMBEDDING_A, Role.EMBEDDING_B)


def check_vllm(folder: str | Path) -> list[str]:
    """Checks whether vLLM serves the LoRA in a folder, and with the scales that peft gives it.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        One sentence for each problem; an empty list if there is none. That the base model's class supports LoRA on
        these modules is not checked.

    Raises:
        ValueError: If a file is missing or invalid.

    Examples:
        >>> import tempfile, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=8, target_modules=["0"], use_dora=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config).save_pretrained(folder)
        ...     [problem.split(":")[0] for problem in check_vllm(folder)]
        ['use_dora=True', "key 'base_model.model.0.lora_magnitude_vector'"]
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_NAME, folder)
    with open_weights(folder, config) as file:
        return [*_config_problems(config), *_key_problems(file), *_scale_problems(config, file)]


def needed_rank(rank: int) -> int | None:
    """Returns the smallest value of `--max-lora-rank` that allows a rank; None if there is none.

    Examples:
        >>> needed_rank(20)
        32
    """
    return next((allowed for allowed in RANKS if rank <= allowed), None)


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yields the problems of the fields that vLLM reads."""
    if config.get("peft_type") != "LORA":
        yield f"peft_type={config.get('peft_type')!r}: vLLM serves the type LORA; export the adapter."
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (name == "r" and value < 1):
            yield f"{name}={value!r}: vLLM needs a number."
    if config.get("bias", "none") != "none":
        yield f"bias={config['bias']!r}: vLLM loads no trained biases; export with drop=['bias']."
    if config.get("modules_to_save"):
        yield f"modules_to_save={config['modules_to_save']!r}: vLLM loads no whole modules; merge the adapter."
    if config.get("use_dora"):
        yield "use_dora=True: vLLM does not support DoRA; export the adapter with its base model."
    if not config.get("target_modules"):
        yield f"target_modules={config.get('target_modules')!r}: vLLM needs names of modules; export the adapter."


def _key_problems(file: TensorFile) -> Iterator[str]:
    """Yields the problems of the names and shapes of tensors."""
    ranks = []
    for key, info in file.tensors.items():
        parsed = parse_key("peft", key)
        if parsed is None or parsed[1] not in (*_LAYERS, *_EMBEDDINGS):
            yield f"key {key!r}: vLLM knows lora_A, lora_B and those of embeddings only; export the adapter."
        elif len(info.shape) != 2:
            yield f"key {key!r}: shape {info.shape}: vLLM has LoRA for linear layers and embeddings, not convolutions."
        elif parsed[1] in (Role.A, Role.EMBEDDING_A):
            ranks.append(info.shape[0])
        if not key.startswith(FORMATS["peft"].prefix):
            yield f"key {key!r}: vLLM needs the prefix {FORMATS['peft'].prefix!r}; save the adapter with peft."
    if ranks and needed_rank(max(ranks)) is None:
        yield f"rank {max(ranks)}: vLLM allows at most {RANKS[-1]}; export with a lower rank."


def _scale_problems(config: Mapping[str, Any], file: TensorFile) -> Iterator[str]:
    """Yields a problem if vLLM's one scale is not that of every module, or the rank of the file is above `r`."""
    try:
        settings = read_settings({**config, "peft_type": "LORA"})
    except (ValueError, NotImplementedError) as error:
        yield f"{error}"
        return
    served = settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)
    for key, info in file.tensors.items():
        module, role = parse_key("peft", key) or ("", None)
        if role not in (Role.A, Role.EMBEDDING_A):
            continue
        if info.shape[0] > settings.rank:
            yield f"r={settings.rank}: {module} has rank {info.shape[0]}, and vLLM reserves memory for r; export again."
            return
        scale = settings.of(module).scale
        if not math.isclose(scale, served, rel_tol=1e-6):
            yield (
                f"alpha_pattern, rank_pattern: {module} has the scale {scale:g}, and vLLM, which ignores patterns, "
                f"would use {served:g}; export the adapter, which folds the scales."
            )
            return
