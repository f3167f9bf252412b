"""Linear layer with a NormalFloat weight.

The quantized weight Q is stored in buffers, which a state dict contains and an optimizer does not see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_zoo import peft_patches
from peft_zoo.adapters.base.offload import loaded
from peft_zoo.kernels.normal_float.linear import nf_linear, nf_merge
from peft_zoo.kernels.normal_float.quantize import NFConfig, NFTensor, dequantize, empty_nf, quantize

Factors = tuple[Tensor, Tensor]
"""B `(out, r)` and A `(r, in)` in float32; their product is the low-rank part, scaling included."""

NF8 = "nf8"
"""Value of `keep_init` for initial factors in 8 bits."""

NF8_CONFIG = NFConfig(8, 8, "fp32", 64, 256)


def sha256(tensors: Iterable[Tensor]) -> str:
    """Returns the SHA-256 of tensors in their order, with their dtypes and shapes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class NFLinear(nn.Linear):
    """Frozen linear layer `x Q^T + b` with a weight Q in NormalFloat.

    Args:
        weight: Q, quantized from `(out, in)`; tensors on the meta device are filled in from a state dict.
        config: Quantization config of Q.
        shape: Shape `(out, in)` of Q.
        bias: Bias `(out,)`, shared with the caller.
        dtype: Dtype of the weight before quantization, and of merged weights.
        transposed: Whether the layer was a `Conv1D` of transformers, which stores `(in, out)`.
        initial: Initial factors B and A, or their 8-bit form from `pack_initial_factors`; None if not kept.
        use_initial: Whether the layer adds the initial factors' product to Q, as in a standalone model.

    Attributes:
        weight: Packed codes, from which peft reads device and dtype. An integer dtype keeps adapters in float32.
        expected_sha256: Checksum of the Q that must be loaded from a file; None once it is verified.
        expected_initial: Checksum of the initial factors that a file brings along with Q, if the file has one.

    Examples:
        >>> from peft_zoo.kernels.normal_float.quantize import NFConfig, quantize
        >>> config = NFConfig(bits=4, block=16)
        >>> layer = NFLinear(quantize(torch.randn(8, 16), config), config, (8, 16))
        >>> layer(torch.randn(2, 16)).shape, layer.dense().shape
        (torch.Size([2, 8]), torch.Size([8, 16]))
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
        use_initial: bool = False,
    ) -> None:
        peft_patches.apply()
        nn.Module.__init__(self)  # nn.Linear would make a weight
        self.out_features, self.in_features = shape
        self.config, self.dtype, self.transposed, self.use_initial = config, dtype, transposed, use_initial
        self.expected_sha256: str | None = None
        self.expected_initial: str | None = None
        for name, part in zip(self.PARTS, weight, strict=True):
            self.register_buffer(name, part)
        names = self.INITIAL_NF8 if isinstance(initial, NFTensor) else self.INITIAL
        tensors = dict(zip(names, initial, strict=True)) if initial else {}
        for name in (*self.INITIAL, *self.INITIAL_NF8):
            self.register_buffer(name, tensors[name].contiguous() if name in tensors else None)
        self._parameters["bias"] = bias  # assignment would move it to meta where peft creates parameters there

    def __setstate__(self, state: dict[str, Any]) -> None:
        peft_patches.apply()
        super().__setstate__(state)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The packed codes as int8; T5 takes that dtype for a sign not to cast its input to it."""
        codes: Any = self.codes.view(torch.int8)
        codes._is_hf_initialized = True  # transformers fills other tensors with random values
        return codes

    @property
    def packed(self) -> NFTensor:
        """Q as the kernels take it."""
        return NFTensor(*(getattr(self, name) for name in self.PARTS))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(out, in)` of Q."""
        return self.out_features, self.in_features

    @property
    def keep_init(self) -> bool | str:
        """Form of the initial factors, as in `LqLoraConfig.keep_init`: True, "nf8", or False if there are none."""
        return NF8 if self.initial_codes is not None else self.initial_B is not None

    @property
    def initial(self) -> Factors | None:
        """Initial factors (B, A) in float32, or None if not kept; 8-bit factors are dequantized on every access."""
        with loaded(self) if self.codes.is_meta else nullcontext():
            if self.keep_init == NF8:
                packed = NFTensor(*(getattr(self, name) for name in self.INITIAL_NF8))
                return unpack_initial_factors(packed, self.shape)
            return None if self.initial_B is None or self.initial_A is None else (self.initial_B, self.initial_A)

    def saved_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields names and tensors of everything that an adapter's file contains of this layer."""
        for name in self.ALL:
            if getattr(self, name) is not None:
                yield name, getattr(self, name)

    def initial_hash(self) -> str | None:
        """Returns the SHA-256 of the initial factors as they are stored; None if they are not kept."""
        parts = [tensor for name, tensor in self.saved_tensors() if name not in self.PARTS]
        return sha256(parts) if parts else None

    def verify_checksum(self) -> None:
        """Raises a ValueError unless Q matches `expected_sha256`; called before each use, checks only the first one.

        Other libraries load state dicts without checking them.
        """
        if self.expected_sha256 is not None:
            self._verify_checksum()

    @torch.compiler.disable  # a compiled model computes the checksum in its first call too
    def _verify_checksum(self) -> None:
        if sha256(self.packed) != self.expected_sha256:
            raise ValueError(
                f"quantized weight of base_sha256={self.expected_sha256!r} missing or corrupted: the adapter folder "
                "must contain it. A configuration with lq_state='decomposed' is for loading; to quantize again, set "
                "lq_state='new' and base_sha256=None."
            )
        if self.expected_initial not in (None, self.initial_hash()):
            raise ValueError(
                f"initial factors of initial_sha256={self.expected_initial!r} missing or corrupted: load the adapter "
                "again from the folder in which it was saved."
            )
        self.expected_sha256 = self.expected_initial = None

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns Q `(out, in)` in a floating-point dtype."""
        self.verify_checksum()
        return dequantize(self.packed, self.config, self.shape, dtype)

    def merged_weight(self, B: Tensor, A: Tensor) -> Tensor:
        """Returns `Q + B A` in the dtype of the weight before quantization, rounded once."""
        self.verify_checksum()
        return nf_merge(self.packed, self.config, A, B, dtype=self.dtype)

    def forward(self, x: Tensor, A: Tensor | None = None, B: Tensor | None = None, scaling: float = 1.0) -> Tensor:
        """Returns `x Q^T + b` `(..., out)` in the dtype of `x` `(..., in)`, plus `scaling x A^T B^T`, in one operator.

        Without A `(r, in)` and B `(out, r)`, a layer with `use_initial` adds its initial factors instead.
        """
        self.verify_checksum()
        if A is None and B is None and self.use_initial:
            B, A = self.initial or (None, None)
        return nf_linear(x, self.packed, self.config, self.shape, self.bias, A, B, scaling)

    def with_initial(self, initial: Factors | NFTensor | None, use_initial: bool = False) -> NFLinear:
        """Returns a layer that shares the tensors of Q and the bias but has other initial factors."""
        parts = self.packed, self.config, self.shape, self.bias, self.dtype, self.transposed
        layer = NFLinear(*parts, initial, use_initial).train(self.training)
        layer.expected_sha256 = self.expected_sha256
        return layer

    def to_floating(self, weight: Tensor) -> nn.Module:
        """Returns an `nn.Linear` or `Conv1D`, as before quantization, with this bias and a weight `(out, in)`."""
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
        """Returns the sizes, the quantization config, and the rank of initial factors in use."""
        rank = "" if not self.use_initial or self.initial is None else f", initial rank={len(self.initial[1])}"
        return f"{super().extra_repr()}, config={tuple(self.config)}{rank}"

    def _apply(self, fn: Any, recurse: bool = True) -> NFLinear:
        """Moves buffers but keeps their dtypes, since casting scales would change Q; `dtype` follows the model."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return self


def empty_nf_linear(
    layer: Any,
    config: NFConfig,
    keep_init: bool | str,
    rank: int = 0,
    use_initial: bool = False,
    device: torch.device | None = None,
) -> NFLinear:
    """Returns an `NFLinear` to be filled from a state dict, with the shape, bias and dtype of a linear layer.

    `keep_init` and `rank` describe the initial factors; `device` is that of the linear layer by default.
    """
    matrix = weight_matrix(layer)
    (rows, columns), device = matrix.shape, device or matrix.device
    initial = pack_initial_factors(_zero_factors(rows, columns, rank, device), keep_init)
    packed = empty_nf(config, rows * columns, device)
    transposed = isinstance(layer, Conv1D)
    return NFLinear(packed, config, (rows, columns), layer.bias, matrix.dtype, transposed, initial, use_initial)


def detach_initial_factors(layer: NFLinear, keep_init: bool | str) -> tuple[NFLinear, Factors]:
    """Splits a layer of a standalone model into a base layer and the factors (B, A) that a new adapter starts from.

    The base layer shares Q and keeps the factors as `keep_init` says. They have rank 0 if the layer had none.
    """
    factors = (layer.initial if layer.use_initial else None) or _zero_factors(*layer.shape, 0, layer.weight.device)
    base = layer.with_initial(pack_initial_factors(factors, keep_init))
    return base, base.initial or factors


def pack_initial_factors(factors: Factors, keep_init: bool | str) -> Factors | NFTensor | None:
    """Converts initial factors to the form in which a layer keeps them.

    In 8 bits they are one matrix `[B^T, A]` of shape `(r, out + in)`, flattened: the values of a block belong to one
    direction, so they are of similar size, and any rank and shape is possible. The last block is padded.
    """
    if keep_init != NF8:
        return factors if keep_init else None
    B, A = factors
    both = torch.cat([B.mT, A], 1)
    return quantize(both, NF8_CONFIG) if len(A) else empty_nf(NF8_CONFIG, 0, A.device)


def unpack_initial_factors(packed: NFTensor, shape: tuple[int, int]) -> Factors:
    """Returns B and A of the 8-bit form of `pack_initial_factors`, for a matrix of shape `(out, in)`."""
    rows, rank = shape[0], nf8_rank(packed.codes.numel(), shape)
    both = dequantize(packed, NF8_CONFIG, (rank, sum(shape)), torch.float32)
    return both[:, :rows].mT.contiguous(), both[:, rows:].contiguous()


def nf8_rank(num_words: int, shape: tuple[int, int]) -> int:
    """Returns the rank of 8-bit factors from the number of 32-bit words of their codes (up to three are padding)."""
    return 4 * num_words // sum(shape)


def _zero_factors(rows: int, columns: int, rank: int, device: torch.device) -> Factors:
    """Returns factors `(rows, rank)` and `(rank, columns)` of zeros in float32."""
    shapes = (rows, rank), (rank, columns)
    B, A = (torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes)
    return B, A


def weight_matrix(layer: Any) -> Tensor:
    """Returns the weight of an `nn.Linear` or `Conv1D` as `(out, in)`."""
    return layer.weight.mT if isinstance(layer, Conv1D) else layer.weight
