"""Floor 1 of peft-zoo: reads untrusted adapter and model files one tensor at a time, and writes them atomically."""

from peft_zoo.io.folder import check_regular, copy_regular, open_regular, regular_files
from peft_zoo.io.header import TensorInfo
from peft_zoo.io.lora_file import LoraAdapter, LoraModule, open_adapter
from peft_zoo.io.lora_keys import FORMATS, Role, detect_format, make_key, parse_key
from peft_zoo.io.safetensors import TensorFile
from peft_zoo.io.strict_json import parse_json, read_json
from peft_zoo.io.tensor_writer import TensorWriter

__all__ = [
    "FORMATS",
    "LoraAdapter",
    "LoraModule",
    "Role",
    "TensorFile",
    "TensorInfo",
    "TensorWriter",
    "check_regular",
    "copy_regular",
    "detect_format",
    "make_key",
    "open_adapter",
    "open_regular",
    "parse_json",
    "parse_key",
    "read_json",
    "regular_files",
]
