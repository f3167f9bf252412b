"""Measures RandLoRA, peft's RandLoRA, VeRA and LoRA: time and peak memory of a training step, bytes saved for the
backward pass, and file size.

    python -m benchmarks.randlora                measure, print, write benchmarks/results/randlora_cpu.json (or _cuda)
    python -m benchmarks.randlora --quick        the same at toy sizes in seconds; writes nothing
    python -m benchmarks.randlora --markdown     write the saved results into docs/methods/randlora.md

RandLoRA is timed only after its output and gradients have been compared with the definition in float64, in the same run
and with the same matrices. If a comparison fails, its row has no time, nothing is saved and the exit status is 1.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks import common
from benchmarks.training import Case, Report, distance, training_step
from peft_zoo import RandLoraConfig
from peft_zoo.adapters.randlora.layer import RandLoraLayer
from peft_zoo.kernels.random_matrix.basis import read_basis, unit

LORA, PEER = "LoRA (peft)", "RandLoRA (peft)"
OURS: dict[str, dict[str, Any]] = {
    "RandLoRA": {},
    "RandLoRA, tokens only": {"compute": "token"},
    "RandLoRA, ternary": {"basis": "ternary"},
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the cases; by default a layer of a 1-B language model, and twelve layers of half that width."""

    width: int = 2048
    tokens: tuple[int, ...] = (512, 4096)
    r: int = 32
    stack: int = 1024
    stack_tokens: int = 256
    layers: int = 12

    def cases(self) -> list[Case]:
        """Returns a case with one linear layer for each number of tokens, and one with a stack of layers."""
        linear = [
            Case(f"linear {self.width} x {self.width}, {tokens} tokens", self._linear, (1, tokens, self.width))
            for tokens in self.tokens
        ]
        name = f"{self.layers} linear layers {self.stack} x {self.stack} with ReLU, {self.stack_tokens} tokens"
        return [*linear, Case(name, self._stack, (1, self.stack_tokens, self.stack))]

    def _linear(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(self.width, self.width))

    def _stack(self) -> nn.Sequential:
        modules = (m for _ in range(self.layers) for m in (nn.Linear(self.stack, self.stack), nn.ReLU()))
        return nn.Sequential(*modules)

    def methods(self) -> dict[str, Callable[[list[str]], Any]]:
        """Returns functions from the names of the linear layers to a configuration, by method."""
        r = self.r
        peers: dict[str, Callable[[list[str]], Any]] = {
            LORA: lambda targets: LoraConfig(r=r, target_modules=targets),
            "VeRA (peft), r=256": lambda targets: VeraConfig(r=256, target_modules=targets),
            PEER: lambda targets: peft.RandLoraConfig(r=r, target_modules=targets),
        }
        ours = {name: functools.partial(_config, r, fields) for name, fields in OURS.items()}
        return {**peers, **ours}


QUICK = Sizes(width=64, tokens=(16,), r=8, stack=48, stack_tokens=8, layers=3)


def _config(r: int, fields: dict[str, Any], targets: list[str]) -> RandLoraConfig:
    return RandLoraConfig(r=r, target_modules=targets, **fields)


# --- comparison with the definition ---

TOLERANCE = 1e-5
"""Largest relative error of float32 in the norm of a whole tensor: some tens of roundings."""


def definition(layer: RandLoraLayer, lambda_: Tensor, gamma: Tensor) -> Tensor:
    """Returns ΔW (out, in) by its definition, B M with M[(k, j)] = λ[k, j] A[k] γ[j], in the dtype of λ."""
    config = layer.configs["default"]
    basis, k = layer.bases["default"][lambda_.device], config.kind(layer.small)
    stored = basis.covering(config.r) if config.cover_features else basis.A
    A = read_basis(stored, k, config.r, 0, layer.small, lambda_.dtype)
    B = read_basis(basis.B, k, layer.large, 0, lambda_.numel(), lambda_.dtype)
    M = lambda_[:, :, None] * A[:, None] * gamma
    V = config.scaling * unit(k) ** 2 * (B @ M.flatten(0, 1))
    return V if layer.out_features >= layer.in_features else V.mT


def check(fields: dict[str, Any], r: int, shape: tuple[int, int], tokens: int, device: torch.device) -> str | None:
    """Compares a RandLoRA layer of shape `(out, in)` with the definition in float64; returns the error, or None."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(shape[1], shape[0]))
    model = get_peft_model(base, _config(r, {**fields, "init_weights": False}, ["0"])).to(device)
    (layer,) = (m for m in model.modules() if isinstance(m, RandLoraLayer))
    x = torch.randn(tokens, shape[1], device=device, requires_grad=True)
    dy = torch.randn(tokens, shape[0], device=device)
    scales = layer.zoo_randlora_lambda["default"], layer.zoo_randlora_gamma["default"]
    y = model(x)
    got = [y, *torch.autograd.grad(y, [x, *scales], dy)]
    linear: Any = layer.base_layer
    wide = [t.detach().double().requires_grad_() for t in (x, *scales)]
    y = wide[0] @ (linear.weight.double() + definition(layer, *wide[1:])).mT + linear.bias.double()
    want = [y, *torch.autograd.grad(y, wide, dy.double())]
    error = max(distance(g.detach(), w.detach()) for g, w in zip(got, want, strict=True))
    return None if error < TOLERANCE else f"relative error {error:.1e}"


# --- measuring ---


def file_bytes(model: Any) -> int:
    """Returns the size of the adapter file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return Path(folder, "adapter_model.safetensors").stat().st_size


def measure(sizes: Sizes, repeats: int, case: Case, device: torch.device) -> list[dict[str, Any]]:
    """Returns the rows of one case, LoRA first."""
    linear = {key: m for key, m in case.build().named_modules() if isinstance(m, nn.Linear)}
    shapes = {(m.out_features, m.in_features) for m in linear.values()}
    models, wrong = {}, {}
    for name, config in sizes.methods().items():
        if name in OURS:
            found = (check(OURS[name], sizes.r, shape, case.shape[1], device) for shape in shapes)
            wrong[name] = "; ".join(filter(None, found))
        torch.manual_seed(0)
        models[name] = get_peft_model(case.build(), config(list(linear))).to(device)
    steps = {name: training_step(model, case, device) for name, model in models.items() if not wrong.get(name)}
    seconds = common.interleaved(steps, repeats, device)
    rows = []
    for name, model in models.items():
        row: dict[str, Any] = {
            "method": name,
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        if wrong.get(name):
            rows.append(row | {"wrong": wrong[name]})
            continue
        x = torch.randn(case.shape, device=device, requires_grad=True)
        rows.append(
            row
            | {
                "seconds": statistics.median(seconds[name]),
                "seconds_all": seconds[name],
                "times_lora": common.ratio(seconds[name], seconds[LORA]),
                "times_peer": common.ratio(seconds[name], seconds[PEER]),
                "peak_bytes": common.peak_bytes(steps[name], device),
                "saved_bytes": common.saved_for_backward(functools.partial(model, x), model).bytes,
                "file_bytes": file_bytes(model),
            }
        )
    return rows


# --- tables ---

HEADER = ("", "parameters", "ms a step", "x LoRA", "x peft's RandLoRA", "peak MiB", "saved MiB", "file MiB")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns a row as text; a row that failed its comparison has no results."""
    name, parameters = row["method"], f"{row['parameters']:,}"
    if "wrong" in row:
        return name, parameters, "wrong", *["-"] * 5
    peak, saved, size = (f"{row[key] / common.MIB:.1f}" for key in ("peak_bytes", "saved_bytes", "file_bytes"))
    time = f"{row['seconds'] * 1e3:.1f}"
    return name, parameters, time, f"{row['times_lora']:.2f}", f"{row['times_peer']:.2f}", peak, saved, size


REPORT = Report("randlora", HEADER, cells)


def main(arguments: Sequence[str] | None = None) -> int:
    options = REPORT.parser(str(__doc__).split("\n\n")[0]).parse_args(arguments)
    if options.markdown:
        REPORT.write_page()
        return 0
    sizes = QUICK if options.quick else Sizes()
    return REPORT.run(options, sizes.cases(), functools.partial(measure, sizes, options.repeats), sizes=asdict(sizes))


if __name__ == "__main__":
    sys.exit(main())
