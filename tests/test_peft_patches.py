"""Functions of peft are overridden with the first quantized layer, and only in modules of peft and of peft_zoo."""

from __future__ import annotations

import json
import subprocess
import sys

CHILD = """
import json, sys, types
for name in "torchvision", "torchao", "bitsandbytes":  # they cost time
    sys.modules[name] = None
import peft, peft.tuners.vera.layer, transformers
from peft.tuners.tuners_utils import BaseTuner

user = types.ModuleType("user")
user.resolve_quantization_backend = peft.utils.resolve_quantization_backend
sys.modules["user"] = user

def names():
    modules = {name: sys.modules[name] for name in [*sys.modules] if name.partition(".")[0] in ("peft", "user")}
    found = {f"{name}.{key}": id(value) for name, module in modules.items() for key, value in vars(module).items()}
    return found | {f"BaseTuner.{key}": id(value) for key, value in vars(BaseTuner).items()}

def changed(before):
    now = names()
    return sorted(name for name in before if now[name] != before[name])

before = names()
import peft_zoo
report = {"import": changed(before)}
import torch
from peft_zoo.kernels.normal_float.quantize import NFConfig, quantize
from peft_zoo.lq_lora import NFLinear
config = NFConfig(4, 8, "fp32", 16, 16)
make = lambda: NFLinear(quantize(torch.randn(4, 16), config), config, (4, 16))
before = names()
first = make()
report["first"] = changed(before)
before = names()
make()
report["second"] = changed(before)
resolve = peft.utils.resolve_quantization_backend
report["backends"] = [type(resolve(layer)).__name__ for layer in (first, torch.nn.Linear(4, 4))]
import peft_zoo.adapters.base.layout
report["ours"] = peft_zoo.adapters.base.layout.resolve_quantization_backend is resolve
print(json.dumps(report))
"""


def test_peft_is_overridden_with_the_first_quantized_layer() -> None:
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    report = json.loads(child.stdout.splitlines()[-1])
    assert [name for name in report["import"] if "MAPPING" not in name] == []
    patched = {"resolve_quantization_backend", "dispatch_default", "dequantize_module_weight"}
    methods = {"BaseTuner._check_new_adapter_config", "BaseTuner._check_merge_allowed"}
    functions = {name for name in report["first"] if name not in methods}
    assert methods < set(report["first"]) and {name.rpartition(".")[2] for name in functions} == patched
    assert {name.partition(".")[0] for name in functions} == {"peft"}, "not those of the user's module"
    assert "peft.tuners.vera.layer.resolve_quantization_backend" in functions
    assert report["second"] == [] and report["ours"]
    assert report["backends"] == ["NFBackend", "NoneType"]
