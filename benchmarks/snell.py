"""Compares SNELL and SNELLA with peft's LoRA of equal trainable parameters and with a dense version of the authors'
algorithm: time and peak memory of a training step, and bytes saved for backward.

    python -m benchmarks.snell                 measure, print, write benchmarks/results/snell_cpu.json (or _cuda)
    python -m benchmarks.snell --quick         the same at toy sizes, in seconds; writes nothing
    python -m benchmarks.snell --markdown      write the saved results into docs/methods/snell.md; measures nothing

A method is only timed after its output, gradients and mask have been compared with the definition in float64, in this
run and for these matrices. If one fails, its row has no values, nothing is saved and the exit status is 1.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks import common
from benchmarks.training import Case, Report, distance, training_step
from peft_zoo import SnellConfig
from peft_zoo.adapters.snell.layer import SnellLayer

RANK = 8  # an adapted layer has 8 (in + out) trainable parameters with LoRA and SNELL, and 3 more with mix_k
BASELINE, DENSE = "LoRA (peft)", "SNELL, dense autograd"


# ---- candidates ----

VARIANTS: dict[str, dict[str, Any]] = {
    "SNELL fused": {"forward_mode": "fused"},
    "SNELL additive": {"forward_mode": "additive"},
    # The budget is allocated at every step; allocating once an epoch costs less.
    "SNELLA fused": {"kernel": "mix_k", "sparsity": 0.5, "target_sparsity": 0.9, "total_step": 10**6},
    "KLoRA fused": {"sparsify": "none", "forward_mode": "fused"},
}


class DenseSnell(nn.Module):
    """The authors' released algorithm without gradient checkpointing: dense matrices, differentiated by autograd.

    Args:
        base: Frozen base layer.
        A: Input factors `(2, in, r/2)`.
        B: Output factors `(2, out, r/2)`.
        config: SNELL config with `sparsify` "none" or "signed_square" and `kernel` "piecewise_linear" or "mix_k".
        kernel_params: `[alpha, gamma, beta]` of `mix_k`, else None.
    """

    def __init__(
        self, base: nn.Module, A: Tensor, B: Tensor, config: SnellConfig, kernel_params: Tensor | None = None
    ) -> None:
        super().__init__()
        self.base, self.A, self.B, self.config = base, nn.Parameter(A), nn.Parameter(B), config
        self.kernel_params = None if kernel_params is None else nn.Parameter(kernel_params)

    def dense(self) -> Tensor:
        """Computes the kernel matrix W, `(in, out)`."""
        W = self.config.kernel_scale * (torch.cdist(self.A[0], self.B[0]) - torch.cdist(self.A[1], self.B[1]))
        if self.kernel_params is None:
            return W
        alpha, gamma, beta = self.kernel_params
        return W + alpha * torch.softmax(W / gamma, dim=1) + beta

    def mask(self, W: Tensor) -> Tensor:
        """Returns the mask of the entries above the quantile, `(in, out)`."""
        magnitude = W.detach().abs()
        if self.config.sparsify == "none":
            return torch.ones_like(W, dtype=torch.bool)
        return magnitude > float(_quantile(magnitude, self.config.sparsity))

    def update(self, W: Tensor, mask: Tensor) -> Tensor:
        """Computes S, `(in, out)`."""
        return W if self.config.sparsify == "none" else W * (W.detach().abs() * mask)

    def forward(self, x: Tensor) -> Tensor:
        W = self.dense()
        return self.base(x) + x @ self.update(W, self.mask(W))


def _quantile(magnitude: Tensor, share: float) -> Tensor:
    """Computes `torch.quantile`; by sorting for more than 2^24 elements, which that function refuses."""
    if magnitude.numel() <= 2**24:
        return torch.quantile(magnitude.flatten(), share)
    return magnitude.flatten().sort().values[int(share * (magnitude.numel() - 1))]


class Block(nn.Module):
    """Transformer block of ViT with six separate linear layers, as the papers adapt them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width)
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


@dataclass(frozen=True)
class Sizes:
    """Sizes of the cases; by default ViT-B/16 on eight images, and a linear layer of a language model with 1 B weights.

    Attributes:
        width: Input and output features of the linear layer.
        tokens: Numbers of tokens of the linear layer, one case each.
        block_width: Width of the ViT blocks.
        heads: Attention heads of a block.
        batch: Images.
        patches: Tokens of an image.
        blocks: ViT blocks.
    """

    width: int = 2048
    tokens: tuple[int, ...] = (512, 4096)
    block_width: int = 768
    heads: int = 12
    batch: int = 8
    patches: int = 197
    blocks: int = 1

    def cases(self) -> list[Case]:
        """Returns a case of the linear layer for each number of tokens, and one of the ViT blocks."""
        linear = [
            Case(f"linear {self.width} x {self.width}, {tokens} tokens", self._linear, (1, tokens, self.width))
            for tokens in self.tokens
        ]
        name = f"ViT blocks of width {self.block_width} ({self.blocks}), {self.batch} x {self.patches} tokens"
        return [*linear, Case(name, self._blocks, (self.batch, self.patches, self.block_width))]

    def _linear(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(self.width, self.width))

    def _blocks(self) -> nn.Sequential:
        return nn.Sequential(*(Block(self.block_width, self.heads) for _ in range(self.blocks)))


QUICK = Sizes(width=64, tokens=(16,), block_width=48, heads=2, batch=2, patches=5)


def build(name: str, base: nn.Module, device: torch.device) -> Any:
    """Adapts every linear layer of `base` with the candidate `name` and moves the model to a device."""
    targets = [key for key, module in base.named_modules() if isinstance(module, nn.Linear)]
    if name == BASELINE:
        return get_peft_model(base, LoraConfig(r=RANK, target_modules=targets)).to(device)
    fields = VARIANTS.get(name, {})
    model = get_peft_model(base, SnellConfig(r=RANK, target_modules=targets, **fields))
    if name == DENSE:
        for key, module in list(model.named_modules()):
            if isinstance(module, SnellLayer):
                model.set_submodule(key, _dense_twin(module))
    return model.to(device)


def _dense_twin(layer: SnellLayer, dtype: torch.dtype = torch.float32) -> DenseSnell:
    def copied(container: Any) -> Any:
        return container["default"].detach().clone().to(dtype) if "default" in container else None

    A, B, params = (copied(c) for c in (layer.zoo_snell_A, layer.zoo_snell_B, layer.zoo_snell_kernel_params))
    return DenseSnell(layer.base_layer, A, B, layer.configs["default"], params)


# ---- correctness ----

TOLERANCE = 1e-5
"""Largest relative error of float32 against float64 in the norm of a whole tensor: some tens of roundings."""


@functools.cache
def check(name: str, shape: tuple[int, int], device: torch.device) -> str | None:
    """Compares a candidate's layer of shape `(out, in)` with the definition in float64; returns an error text, or None.

    Weights that float32 cannot tell from the threshold may fall on either side of it: at most one, and one more in a
    million. Output and gradients are compared for the mask that the layer has.
    """
    torch.manual_seed(0)
    fields = {**VARIANTS[name], "init_weights": False}  # at the usual start the update is too small to be seen
    base = nn.Sequential(nn.Linear(shape[1], shape[0]))
    ours = get_peft_model(base, SnellConfig(r=RANK, target_modules=["0"], **fields)).to(device)
    (adapted,) = (m for m in ours.modules() if isinstance(m, SnellLayer))
    twin = _dense_twin(adapted, torch.float64)
    W = twin.dense()
    kept = adapted.get_delta_weight("default").detach().t() != 0
    moved = int((kept != _largest(W.detach().abs(), int(adapted.zoo_snell_num_kept["default"]))).sum())
    if moved > 2 * (1 + W.numel() // 10**6):
        return f"the mask differs from the definition in {moved} weights"
    error = _error(ours, adapted, twin, twin.update(W, kept))
    return None if error < TOLERANCE else f"relative error {error:.1e}"


def _largest(magnitude: Tensor, count: int) -> Tensor:
    """Returns the mask of the `count` largest elements."""
    rank = magnitude.numel() - count
    return magnitude > (magnitude.flatten().sort().values[rank - 1] if rank else -1)


def _error(ours: nn.Module, adapted: SnellLayer, twin: DenseSnell, S: Tensor) -> float:
    """Returns the largest relative error of the update's output and of the gradients of input and parameters."""
    x = torch.randn(64, adapted.in_features, device=S.device, requires_grad=True)
    dy = torch.randn(64, adapted.out_features, device=S.device)
    base: Any = adapted.base_layer
    y = ours(x)
    got = [y - base(x), *torch.autograd.grad(y, [x, *(p for p in adapted.parameters() if p.requires_grad)], dy)]
    x64 = x.detach().double().requires_grad_()
    factors = [p for p in (twin.A, twin.B, twin.kernel_params) if p is not None]
    y64 = x64 @ (base.weight.double().t() + S)
    want = [x64 @ S, *torch.autograd.grad(y64, [x64, *factors], dy.double())]
    return max(distance(g.detach(), w.detach()) for g, w in zip(got, want, strict=True))


# ---- measuring ----


def matrices_saved(model: nn.Module, case: Case, device: torch.device) -> int:
    """Counts saved tensors of at least the size of an adapted matrix; with four tokens no activation is as large."""
    x = torch.randn(1, 4, case.shape[2], device=device, requires_grad=True)
    smallest = min(m.weight.numel() for m in case.build().modules() if isinstance(m, nn.Linear))
    return common.saved_for_backward(lambda: model(x), model).at_least(smallest)


def measure(repeats: int, case: Case, device: torch.device) -> list[dict[str, Any]]:
    """Returns the rows of one case, peft's LoRA first."""
    shapes = {tuple(m.weight.shape) for m in case.build().modules() if isinstance(m, nn.Linear)}
    wrong = {name: "; ".join(filter(None, (check(name, shape, device) for shape in shapes))) for name in VARIANTS}
    models = {}
    for name in (BASELINE, *VARIANTS, DENSE):
        torch.manual_seed(0)
        models[name] = build(name, case.build(), device)
    steps = {name: training_step(model, case, device) for name, model in models.items() if not wrong.get(name)}
    seconds = common.interleaved(steps, repeats, device)
    return [_row(name, model, case, steps, seconds, wrong.get(name), device) for name, model in models.items()]


def _row(
    name: str,
    model: nn.Module,
    case: Case,
    steps: dict[str, common.Step],
    seconds: dict[str, list[float]],
    wrong: str | None,
    device: torch.device,
) -> dict[str, Any]:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if wrong:
        return {"method": name, "parameters": trained, "wrong": wrong}
    x = torch.randn(case.shape, device=device, requires_grad=True)
    matrices = matrices_saved(model, case, device)
    if name != DENSE and matrices:
        return {"method": name, "parameters": trained, "wrong": f"saves {matrices} tensors of in x out elements"}
    return {
        "method": name,
        "parameters": trained,
        "seconds": statistics.median(seconds[name]),
        "seconds_all": seconds[name],
        "times_lora": common.ratio(seconds[name], seconds[BASELINE]),
        "peak_bytes": common.peak_bytes(steps[name], device),
        "saved_bytes": common.saved_for_backward(lambda: model(x), model).bytes,
        "matrices_saved": matrices,
    }


# ---- output ----

HEADER = ("", "parameters", "ms a step", "x LoRA", "peak MiB", "saved MiB", "matrices saved")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Formats a row; a wrong one has no values."""
    name, parameters = row["method"], f"{row['parameters']:,}"
    if "wrong" in row:
        return name, parameters, "wrong", "-", "-", "-", "-"
    peak, saved = (f"{row[key] / common.MIB:.1f}" for key in ("peak_bytes", "saved_bytes"))
    time = f"{row['seconds'] * 1e3:.1f}"
    return name, parameters, time, f"{row['times_lora']:.2f}", peak, saved, f"{row['matrices_saved']}"


REPORT = Report("snell", HEADER, cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = REPORT.parser(str(__doc__).split("\n\n")[0])
    parser.add_argument("--blocks", type=int, default=1, help="number of ViT blocks (default 1)")
    options = parser.parse_args(arguments)
    if options.markdown:
        REPORT.write_page()
        return 0
    sizes = QUICK if options.quick else Sizes(blocks=options.blocks)
    rows = functools.partial(measure, options.repeats)
    return REPORT.run(options, sizes.cases(), rows, rank=RANK, sizes=asdict(sizes))


if __name__ == "__main__":
    sys.exit(main())
