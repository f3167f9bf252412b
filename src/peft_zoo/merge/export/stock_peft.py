"""Run as a script by `verify`: loads a LoRA with stock peft onto layers without weights and compares its outputs.

Reads a JSON object with `folder`, `outputs` and `modules` from the standard input, and prints the difference of each
module's outputs. It imports nothing of peft_zoo, and sees to it that nothing else does.
"""

import json
import sys
from typing import Any

if __name__ == "__main__":
    sys.modules["peft_zoo"] = None  # type: ignore[assignment]  # importing it is an ImportError now

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

MARK = "peft-zoo child: "


class ZeroLinear(nn.Linear):
    """Linear layer with a weight of zeros that takes no memory."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows, bias=False, device="meta")
        self.weight = nn.Parameter(torch.zeros(()).expand(rows, columns), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns zeros."""
        return x.new_zeros(*x.shape[:-1], self.out_features)


def layer(kind: str, inner: list[int], rows: int) -> nn.Module:
    """Makes a layer of zeros: linear, an embedding, or a convolution with one position of its kernel."""
    if kind == "linear":
        return ZeroLinear(inner[0], rows)
    if kind == "embedding":
        made: Any = nn.Embedding(inner[0], rows, device="meta")
    else:
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(inner) - 2]
        made = conv(inner[0], rows, tuple(inner[1:]), bias=False, device="meta")
    made.weight = nn.Parameter(torch.zeros(()).expand(made.weight.shape), requires_grad=False)
    return made


def compare(job: dict[str, Any]) -> dict[str, float]:
    """Returns by module the difference of the outputs, relative to the size of their terms."""
    outputs = load_file(job["outputs"])
    model: Any = nn.Module()
    for name, module in job["modules"].items():
        *parents, last = name.split(".")
        owner: Any = model
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(last, layer(module["kind"], module["inner"], len(outputs[f"{name}|y"])))
    config = PeftConfig.from_pretrained(job["folder"])
    config.task_type = None  # the layers alone are no model of a task
    model = PeftModel.from_pretrained(model, job["folder"], config=config).eval().base_model.model
    found = {}
    with torch.no_grad():
        for name, module in job["modules"].items():
            x, y = outputs[f"{name}|x"], outputs[f"{name}|y"]
            x = x if module["kind"] == "embedding" else x.T.reshape(-1, *module["inner"])
            z = model.get_submodule(name)(x).reshape(len(x), -1).T
            size = outputs[f"{name}|size"].item()
            found[name] = (z.float() - y).norm().item() / size if size else z.norm().item()
    return found


if __name__ == "__main__":
    sys.stdout.write(f"\n{MARK}{json.dumps(compare(json.loads(sys.stdin.read())))}\n")
