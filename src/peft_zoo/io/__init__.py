"""Adapter files: read with suspicion, one module at a time, and written whole or not at all."""

from peft_zoo.io.lora_file import LoraAdapter, LoraModule, open_adapter
from peft_zoo.io.lora_keys import FORMATS, Role, detect_format, make_key, parse_key
from peft_zoo.io.safetensors import (
    TensorFile,
    TensorInfo,
    new_file,
    new_folder,
    parse_json,
    read_json,
    write_tensors,
)

__all__ = [
    "FORMATS",
    "LoraAdapter",
    "LoraModule",
    "Role",
    "TensorFile",
    "TensorInfo",
    "detect_format",
    "make_key",
    "new_file",
    "new_folder",
    "open_adapter",
    "parse_json",
    "parse_key",
    "read_json",
    "write_tensors",
]
