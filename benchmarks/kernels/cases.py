"""What `benchmarks.kernels.suite` measures: for every operator its arguments, the work it cannot avoid, and its peers.

Bytes, FLOPs and instructions are those that the algorithm needs at the least, counted by hand: they are the
denominators of the table, so a kernel that moves more shows as one that is slower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_zoo.kernels.snell.linear import kernelized_linear
from peft_zoo.kernels.snell.matrix import KernelSpec, reference_weight

Arguments = tuple[Any, ...]
Step = Callable[[], object]

SPEC = KernelSpec(scale=0.1)  # the update is then as large as the weights of `_weight`, and an error in it is seen
FIELDS = (SPEC.kernel, SPEC.norm, SPEC.scale, SPEC.sparsify)
DENSITY = 0.1

FLOAT32 = 1e-5
BFLOAT16 = 2**-8 + FLOAT32
"""One rounding: half of the spacing, of 2^-7 next to 1."""
PRODUCT = 2**-7
"""Of a whole tensor in the norm: operands, products and results are rounded to bfloat16, each within 2^-8."""


@dataclass(frozen=True)
class Sizes:
    """A square weight, and what goes through it."""

    width: int = 4096
    rank: int = 16
    groups: int = 2
    tokens: int = 8192
    adapters: tuple[int, ...] = (1, 4, 8)

    @property
    def numel(self) -> int:
        """Entries of the weight."""
        return self.width * self.width

    @property
    def slots(self) -> int:
        """Instructions a lane to compute the kernel matrix once: two for each coordinate, twelve for the rest."""
        return self.numel * (2 * self.rank + 12)


FULL = Sizes()
QUICK = Sizes(width=256, rank=8, tokens=64, adapters=(1, 3))


@dataclass(frozen=True)
class Rates:
    """What a GPU does in a second.

    Attributes:
        bytes: To and from memory.
        flops: Of bfloat16 products on tensor cores.
        slots: Float32 instructions of all lanes.
    """

    bytes: float
    flops: float
    slots: float


H100 = Rates(bytes=3084e9, flops=989e12, slots=132 * 128 * 1.83e9)
"""An H100 SXM: 92 % of the 3350 GB/s of its data sheet, the data sheet's 989 TFLOP/s, and 132 multiprocessors of 128
lanes at 1.83 GHz."""


@dataclass(frozen=True)
class Work:
    """One pass, whose memory traffic, products and instructions overlap."""

    bytes: int = 0
    flops: int = 0
    slots: int = 0

    def seconds(self, rates: Rates) -> dict[str, float]:
        """How long each would take alone; the pass takes the longest."""
        return {
            "memory": self.bytes / rates.bytes,
            "products": self.flops / rates.flops,
            "instructions": self.slots / rates.slots,
        }


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        name: What the table calls it.
        operators: Operators that it covers; if there is no `run` it calls the first.
        make: Builds the arguments on a device.
        work: Its passes, one after the other.
        tolerance: Largest relative error against the definition in float64.
        by_norm: Whether that is of the norm of a whole result, and not of each entry beside `|entry| + rms`.
        outliers: How many entries may err by more: those that float32 cannot tell from a threshold.
        peers: Others that compute the same: of the arguments a step to be timed.
        run: What is run, if not the operator.
        reference: Its definition, if not the operator's.
    """

    name: str
    operators: tuple[str, ...]
    make: Callable[[torch.device], Arguments]
    work: tuple[Work, ...]
    tolerance: float = 0.0
    by_norm: bool = False
    outliers: int = 0
    peers: Mapping[str, Callable[..., Step]] = field(default_factory=dict)
    run: Callable[..., Any] | None = None
    reference: Callable[..., Any] | None = None

    @property
    def bytes(self) -> int:
        """All that is moved."""
        return sum(work.bytes for work in self.work)

    def floor(self, rates: Rates) -> tuple[float, str]:
        """The least seconds it can take, and what bounds the longest pass."""
        passes = [max((s, bound) for bound, s in work.seconds(rates).items()) for work in self.work]
        return sum(seconds for seconds, _ in passes), max(passes)[1]


# ---- arguments ----


def random_tensor(*shape: int, device: torch.device, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)


def _weight(sizes: Sizes, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return random_tensor(sizes.width, sizes.width, device=device, scale=sizes.width**-0.5, dtype=dtype)


def _mask(sizes: Sizes, device: torch.device) -> Tensor:
    return random_tensor(sizes.width, sizes.width + 1, device=device)[:, 1:].contiguous() > 0


def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, device=device)


def _tokens(sizes: Sizes, device: torch.device, seed: int = 0) -> Tensor:
    return random_tensor(sizes.tokens + seed, sizes.width, device=device, dtype=torch.bfloat16)[seed:]


def _factors(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor, None, Tensor]:
    """A, B, no parameters, and how many entries are kept."""
    shape = sizes.groups, sizes.width, sizes.rank // sizes.groups
    A, B = random_tensor(*shape, device=device), random_tensor(*shape, device=device).flip(1)
    return A, B, None, torch.tensor(int(DENSITY * sizes.numel), device=device)


def _threshold(sizes: Sizes, device: torch.device) -> Tensor:
    from peft_zoo.kernels.snell.weight import threshold

    return threshold(*_factors(sizes, device), SPEC)


def _loras(sizes: Sizes, adapters: int, seed: int | None, device: torch.device) -> Arguments:
    A = [
        random_tensor(sizes.rank, sizes.width + k, device=device, dtype=torch.bfloat16)[:, k:] for k in range(adapters)
    ]
    size = (sizes.width * sizes.rank * adapters) ** -0.5
    B = [
        random_tensor(sizes.width + k, sizes.rank, device=device, scale=size, dtype=torch.bfloat16)[k:]
        for k in range(adapters)
    ]
    return _weight(sizes, device), [a.contiguous() for a in A], B, [0.5] * adapters, seed


# ---- peers ----


def _addmm(weight: Tensor, A: list[Tensor], B: list[Tensor], scales: list[float], _seed: int | None) -> Step:
    return lambda: torch.addmm(weight, torch.cat(B, 1), torch.cat(A), alpha=scales[0])


def peft_lora(weight: Tensor, A: list[Tensor], B: list[Tensor], scales: list[float], *_: Any) -> Any:
    """A linear layer of peft with one LoRA for each pair of factors, all active."""
    linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    names = [f"adapter{k}" for k in range(len(A))]
    configs = [
        LoraConfig(r=len(a), lora_alpha=s * len(a), target_modules=["0"]) for a, s in zip(A, scales, strict=True)
    ]
    model = get_peft_model(nn.Sequential(linear), configs[0], names[0], autocast_adapter_dtype=False)
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0].to(weight.device, weight.dtype)
    for name, a, b in zip(names, A, B, strict=True):
        layer.lora_A[name].weight.data.copy_(a)
        layer.lora_B[name].weight.data.copy_(b)
    layer.set_adapter(names)
    return layer


def _peft_merge(*arguments: Any) -> Step:
    layer = peft_lora(*arguments)

    def step() -> None:
        layer.merge()
        layer.merged_adapters.clear()  # so that it merges again

    return step


def _peft_training(x: Tensor, A: Tensor, B: Tensor, _kept: Tensor, weight: Tensor, dy: Tensor) -> Step:
    rank = A.shape[0] * A.shape[2]
    a, b = (random_tensor(*shape, device=x.device) for shape in ((rank, weight.shape[1]), (weight.shape[0], rank)))
    layer = peft_lora(weight, [a], [b], [1.0])
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), trained, dy)


def _kthvalue(w: Tensor, num_kept: Tensor, *_: Any) -> Step:
    rank = w.numel() - int(num_kept)
    return lambda: w.abs().flatten().kthvalue(rank)


def _dense_linear(x: Tensor, weight: Tensor, *_: Any) -> Step:
    return lambda: F.linear(x, weight)


# ---- a training step of SNELL ----


def _linear_arguments(sizes: Sizes, device: torch.device) -> Arguments:
    A, B, _, num_kept = _factors(sizes, device)
    x, dy = _tokens(sizes, device), _tokens(sizes, device, seed=1)
    return x.requires_grad_(), A.requires_grad_(), B.requires_grad_(), num_kept, _weight(sizes, device), dy


def _linear_training(x: Tensor, A: Tensor, B: Tensor, num_kept: Tensor, weight: Tensor, dy: Tensor) -> Arguments:
    y = kernelized_linear(x, A, B, None, num_kept, SPEC, weight=weight)
    return y.detach(), *torch.autograd.grad(y, (x, A, B), dy)


def _linear_definition(x: Tensor, A: Tensor, B: Tensor, num_kept: Tensor, weight: Tensor, dy: Tensor) -> Arguments:
    S = reference_weight(A, B, None, num_kept, SPEC)
    y = x @ (weight.t() + S).to(x.dtype)
    return y.detach(), *torch.autograd.grad(y, (x, A, B), dy)


# ---- the cases ----


def cases(sizes: Sizes = FULL) -> list[Case]:
    """All of them, at one size."""
    from benchmarks.kernels import normal_float_cases as lq  # which need what stands above
    from benchmarks.kernels import randlora_cases as randlora

    groups = (_merges, _thresholds, _kernel_matrices, _masks, _linears, randlora.cases, lq.cases)
    return [case for group in groups for case in group(sizes)]


def _merges(sizes: Sizes) -> list[Case]:
    found = []
    for name, adapters, seed in (
        *((f"merge_lora, {k} adapters" if k > 1 else "merge_lora, 1 adapter", k, None) for k in sizes.adapters),
        ("merge_lora, stochastic", 1, 0),
        ("merge_lora_, in place", max(sizes.adapters), None),
    ):
        factors = 2 * 2 * sizes.width * sizes.rank * adapters
        found.append(
            Case(
                name,
                ("merge_lora_" if "in place" in name else "merge_lora",),
                lambda device, adapters=adapters, seed=seed: _loras(sizes, adapters, seed, device),
                (Work(4 * sizes.numel + factors, 2 * sizes.numel * sizes.rank * adapters),),
                tolerance=BFLOAT16 if seed is None else 2 * BFLOAT16,
                peers={"addmm (cuBLAS)": _addmm, "peft": _peft_merge} if seed is None else {},
            )
        )
    return found


def _thresholds(sizes: Sizes) -> list[Case]:
    N = sizes.numel

    def given(device: torch.device) -> Arguments:
        weight = _weight(sizes, device, torch.float32)
        return weight, torch.tensor(int(DENSITY * N), device=device), None

    def near(device: torch.device) -> Arguments:
        *others, _ = given(device)
        return *others, others[0].abs().flatten().kthvalue(N - int(others[1])).values * 1.001

    def kernelized(device: torch.device) -> Arguments:
        return *_factors(sizes, device), None, *FIELDS

    def kernelized_near(device: torch.device) -> Arguments:
        return *_factors(sizes, device), _threshold(sizes, device) * 1.001, *FIELDS

    kthvalue, name = {"kthvalue": _kthvalue}, "kernelized_threshold"
    one, three = (Work(slots=sizes.slots),), (Work(slots=sizes.slots),) * 3
    return [
        Case("magnitude_threshold, float32", ("magnitude_threshold",), given, (Work(4 * N),) * 3, peers=kthvalue),
        Case("magnitude_threshold, warm", ("magnitude_threshold",), near, (Work(4 * N),), peers=kthvalue),
        Case(name, (name,), kernelized, three, tolerance=FLOAT32),
        Case(f"{name}, warm", (name,), kernelized_near, one, tolerance=FLOAT32),
    ]


def _kernel_matrices(sizes: Sizes) -> list[Case]:
    N = sizes.numel
    flips = 2 * (1 + N // 10**6)  # an entry on the wrong side, and the one whose place it takes

    def merge(device: torch.device) -> Arguments:
        threshold = _threshold(sizes, device)
        return *_factors(sizes, device), threshold, None, _weight(sizes, device), torch.bfloat16, *FIELDS

    def alone(device: torch.device) -> Arguments:
        return *_factors(sizes, device), _threshold(sizes, device), None, None, torch.bfloat16, *FIELDS

    def gradient(device: torch.device) -> Arguments:
        A, B, params, _ = _factors(sizes, device)
        return _weight(sizes, device), A, B, params, _threshold(sizes, device), *FIELDS

    matrix = {"tolerance": BFLOAT16, "outliers": flips}
    name = "kernelized_merge"
    return [
        Case(f"{name}, W0 + S", (name,), merge, (Work(4 * N, slots=sizes.slots),), **matrix),
        Case(f"{name}, S alone", (name,), alone, (Work(2 * N, slots=sizes.slots),), **matrix),
        Case(
            "kernelized_factor_grad",
            ("kernelized_factor_grad",),
            gradient,
            (Work(2 * N, 2 * N * sizes.rank, sizes.slots),) * 2,
            tolerance=1e-4,
            outliers=2 * sizes.rank * flips,
        ),
    ]


def _masks(sizes: Sizes) -> list[Case]:
    N = sizes.numel
    level = sizes.width**-0.5

    def threshold(device: torch.device) -> Arguments:
        return _weight(sizes, device), _scalar(level, device)

    def groups(device: torch.device) -> Arguments:
        return _weight(sizes, device), 2, 4, 1

    def masked(device: torch.device) -> Arguments:
        return _weight(sizes, device), _mask(sizes, device), None, None, torch.bfloat16

    return [
        Case("magnitude_mask", ("magnitude_mask",), threshold, (Work(3 * N),)),
        Case("n_m_mask, 2:4", ("n_m_mask",), groups, (Work(3 * N),)),
        Case("mask_weight", ("mask_weight",), masked, (Work(5 * N),)),
    ]


def _linears(sizes: Sizes) -> list[Case]:
    N, T = sizes.numel, sizes.tokens

    def forward(device: torch.device) -> Arguments:
        return _tokens(sizes, device), _weight(sizes, device), _mask(sizes, device), None

    def backward(device: torch.device) -> Arguments:
        dy = _tokens(sizes, device, seed=1)
        return dy, _tokens(sizes, device), _weight(sizes, device), _mask(sizes, device), True

    product, masking, kernel = Work(flops=2 * T * N), Work(5 * N), Work(4 * N, slots=sizes.slots)
    threshold, gradient = (Work(slots=sizes.slots),) * 3, (Work(2 * N, slots=sizes.slots),) * 2
    norm = {"tolerance": PRODUCT, "by_norm": True}
    name = "masked_linear_backward"
    return [
        Case("masked_linear", ("masked_linear",), forward, (masking, product), peers={"dense": _dense_linear}, **norm),
        Case(name, (name,), backward, (masking, product, product, masking), **norm),
        Case(
            "SNELL linear, forward and backward",
            ("kernelized_linear", "kernelized_linear_backward"),
            lambda device: _linear_arguments(sizes, device),
            (*threshold, kernel, product, kernel, product, product, *gradient),
            peers={"LoRA (peft)": _peft_training},
            run=_linear_training,
            reference=_linear_definition,
            **norm,
        ),
    ]
