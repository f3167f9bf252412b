"""A linear layer whose weight is in NormalFloat.

The quantized matrix Q is in buffers, which no optimizer sees and a state dict does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_zoo.kernels.normal_float.linear import nf_linear, nf_merge
from peft_zoo.kernels.normal_float.quantize import NFConfig, NFTensor, dequantize, empty_nf, quantize

__all__ = ["NFLinear"]

Factors = tuple[Tensor, Tensor]
"""B `(out, r)` and A `(r, in)` in float32, whose product is the part of low rank, scaling included."""

NF8 = "nf8"
"""`keep_init` for factors in 8 bits."""

NF8_CONFIG = NFConfig(8, 8, "fp32", 64, 256)


def sha256(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors in their order, with their dtypes and shapes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class NFLinear(nn.Linear):
    """A frozen linear layer `x Q^T + b` with Q in NormalFloat.

    Args:
        weight: Q, `(out, in)`; tensors on the meta device wait for a state dict.
        config: That it was quantized with.
        shape: Of Q.
        bias: `(out,)`, taken over as it is.
        dtype: Of the weight before, and of what is merged.
        transposed: Whether the layer before was transformers' `Conv1D`, which has `(in, out)`.
        initial: B and A that were split off, where they are kept, perhaps packed by `kept`; also of rank 0, to
            be filled.
        standing: Whether `initial` counts where no factors are given: so in a model that is loaded without an adapter.

    Attributes:
        weight: The packed codes: what peft asks for device and dtype. An integer dtype keeps adapters in float32.
        awaited: `sha256` of the Q that a file is to bring; None where there is nothing to wait for.
    """

    PARTS = NFTensor._fields
    INITIAL = ("initial_B", "initial_A")
    INITIAL_NF8 = tuple(f"initial_{part}" for part in NFTensor._fields)
    ALL = (*PARTS, *INITIAL, *INITIAL_NF8)

    codes: Tensor
    initial_B: Tensor | None
    initial_A: Tensor | None
    initial_codes: Tensor | None

    def __init__(
        self,
        weight: NFTensor,
        config: NFConfig,
        shape: tuple[int, int],
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
        initial: Factors | NFTensor | None = None,
        standing: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear would make a weight
        self.out_features, self.in_features = shape
        self.config, self.dtype, self.transposed, self.standing = config, dtype, transposed, standing
        self.awaited: str | None = None
        for name, part in zip(self.PARTS, weight, strict=True):
            self.register_buffer(name, part)
        names = self.INITIAL_NF8 if isinstance(initial, NFTensor) else self.INITIAL
        tensors = dict(zip(names, initial, strict=True)) if initial else {}
        for name in (*self.INITIAL, *self.INITIAL_NF8):
            self.register_buffer(name, tensors[name].contiguous() if name in tensors else None)
        self._parameters["bias"] = bias  # not by assignment: where peft makes new parameters empty, this is none

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The packed codes as int8, by which T5 knows that they are no dtype to compute in."""
        codes: Any = self.codes.view(torch.int8)
        codes._is_hf_initialized = True  # transformers gives such a tensor no random values
        return codes

    @property
    def packed(self) -> NFTensor:
        """Q as the kernels take it."""
        return NFTensor(*(getattr(self, name) for name in self.PARTS))

    @property
    def shape(self) -> tuple[int, int]:
        """Of Q."""
        return self.out_features, self.in_features

    @property
    def keeps(self) -> bool | str:
        """How B and A that were split off are kept, as `keep_init` says it; False where they are not."""
        return NF8 if self.initial_codes is not None else self.initial_B is not None

    @property
    def initial(self) -> Factors | None:
        """B and A that were split off, if they are kept; decoded anew each time where they are in 8 bits."""
        if self.keeps == NF8:
            return unpack_factors(NFTensor(*(getattr(self, name) for name in self.INITIAL_NF8)), self.shape)
        return None if self.initial_B is None or self.initial_A is None else (self.initial_B, self.initial_A)

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of everything that an adapter's file has to hold."""
        for name in self.ALL:
            if getattr(self, name) is not None:
                yield name, getattr(self, name)

    def receive(self) -> None:
        """Look at a Q that was awaited before it is used: whoever loads a state dict need not know of hashes.

        Raises:
            ValueError: If no file has brought it, or another one.
        """
        if self.awaited is None or torch.compiler.is_compiling():
            return
        if sha256(self.packed) != self.awaited:
            raise ValueError(
                f"the quantized matrix of base_sha256={self.awaited!r} is not here: no file has brought it, or a "
                "damaged one. A configuration with lq_state='decomposed' is for loading; to quantize anew, set "
                "lq_state='new' and base_sha256=None."
            )
        self.awaited = None

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Q restored."""
        self.receive()
        return dequantize(self.packed, self.config, self.shape, dtype)

    def plus(self, B: Tensor, A: Tensor) -> Tensor:
        """`Q + B A` in the dtype of the weight before, rounded once."""
        self.receive()
        return nf_merge(self.packed, self.config, A, B, dtype=self.dtype)

    def forward(self, x: Tensor, A: Tensor | None = None, B: Tensor | None = None, scaling: float = 1.0) -> Tensor:
        """`x Q^T + b`, and with A and B `+ scaling x A^T B^T` in the same kernel; see `nf_linear`.

        Args:
            x: `(..., in)`.
            A: `(r, in)`; without A and B a `standing` layer takes its initial factors.
            B: `(out, r)`.
            scaling: s.

        Returns:
            `(..., out)` in the dtype of `x`.
        """
        self.receive()
        if A is None and B is None and self.standing:
            B, A = self.initial or (None, None)
        return nf_linear(x, self.packed, self.config, self.shape, self.bias, A, B, scaling)

    def with_initial(self, initial: Factors | NFTensor | None, standing: bool = False) -> NFLinear:
        """The same matrix and bias with other factors; the tensors are shared."""
        parts = self.packed, self.config, self.shape, self.bias, self.dtype, self.transposed
        layer = NFLinear(*parts, initial, standing).train(self.training)
        layer.awaited = self.awaited
        return layer

    def floating(self, weight: Tensor) -> nn.Module:
        """An ordinary layer of the kind that was quantized, with a weight `(out, in)` and this bias."""
        layer: Any
        if self.transposed:
            layer = Conv1D(1, 1)
            layer.nf, layer.nx = self.shape
            layer.weight = nn.Parameter(weight.mT.contiguous(), requires_grad=False)
        else:
            layer = nn.Linear(1, 1, device="meta")
            layer.out_features, layer.in_features = self.shape
            layer.weight = nn.Parameter(weight, requires_grad=False)
        layer._parameters["bias"] = self.bias
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """The sizes, how Q is quantized, and the rank of what stands beside it."""
        rank = "" if not self.standing or self.initial is None else f", standing rank={len(self.initial[1])}"
        return f"{super().extra_repr()}, config={tuple(self.config)}{rank}"

    def _apply(self, fn: Any, recurse: bool = True) -> NFLinear:
        """Move, but keep the dtypes: scales in another dtype are another matrix. What is merged follows the model."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return self


def empty_nf_linear(
    layer: Any, config: NFConfig, keep_init: bool | str, rank: int = 0, standing: bool = False
) -> NFLinear:
    """An `NFLinear` in the place of a layer, to be filled from a state dict.

    Args:
        layer: `nn.Linear` or `Conv1D`; its weight's device and dtype are taken.
        config: How the matrix is quantized.
        keep_init: Whether it has initial factors, and how.
        rank: Of those.
        standing: As for `NFLinear`.
    """
    matrix = oriented(layer)
    (rows, columns), device = matrix.shape, matrix.device
    initial = kept(_zeros(rows, columns, rank, device), keep_init)
    packed = empty_nf(config, rows * columns, device)
    transposed = isinstance(layer, Conv1D)
    return NFLinear(packed, config, (rows, columns), layer.bias, matrix.dtype, transposed, initial, standing)


def beside(layer: NFLinear, keep_init: bool | str) -> tuple[NFLinear, Factors]:
    """A layer that stood alone as what an adapter goes around, and the factors that the adapter takes over.

    Args:
        layer: Is left as it is.
        keep_init: Whether the factors, perhaps of rank 0, stay as the initial ones, and how.

    Returns:
        The same matrix, whose factors stand no more, and B and A as far as they are kept.
    """
    factors = (layer.initial if layer.standing else None) or _zeros(*layer.shape, 0, layer.weight.device)
    base = layer.with_initial(kept(factors, keep_init))
    return base, base.initial or factors


def kept(factors: Factors, keep_init: bool | str) -> Factors | NFTensor | None:
    """What a layer is given of the factors that were split off.

    In 8 bits they are one matrix `[B^T, A]` of shape `(r, out + in)`, flattened: the values of a block belong to one
    direction, so they are of one size, and any rank and shape is possible. The last block is filled up.
    """
    if keep_init != NF8:
        return factors if keep_init else None
    B, A = factors
    both = torch.cat([B.mT, A], 1)
    return quantize(both, NF8_CONFIG) if len(A) else empty_nf(NF8_CONFIG, 0, A.device)


def unpack_factors(packed: NFTensor, shape: tuple[int, int]) -> Factors:
    """B and A that `kept` has packed, for a matrix of a shape."""
    rows, rank = shape[0], nf8_rank(packed.codes.numel(), shape)
    both = dequantize(packed, NF8_CONFIG, (rank, sum(shape)), torch.float32)
    return both[:, :rows].mT.contiguous(), both[:, rows:].contiguous()


def nf8_rank(words: int, shape: tuple[int, int]) -> int:
    """The rank of factors whose codes take so many words, of which the last is filled up with three codes at most."""
    return 4 * words // sum(shape)


def _zeros(rows: int, columns: int, rank: int, device: torch.device) -> Factors:
    shapes = (rows, rank), (rank, columns)
    B, A = (torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes)
    return B, A


def oriented(layer: Any) -> Tensor:
    """The weight of a layer as `(out, in)`."""
    return layer.weight.mT if isinstance(layer, Conv1D) else layer.weight
