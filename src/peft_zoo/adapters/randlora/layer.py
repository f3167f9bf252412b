r"""RandLoRA: updates of full rank from random matrices that are not saved and a small number of trained scales.

For a weight (out, in) with D the larger size and d the smaller one, and n = ⌈d/r⌉ bases:

    ΔW = α/r · Σ_j B_j Λ_j A Γ_j        B_j (D, r), A (r, d) random and frozen, Λ_j = diag(r), Γ_j = diag(d) trained

(its transpose if in > out). A and B are computed from `projection_prng_key`, with the same bits on every device and in
every dtype. Layers of all shapes, ranks and adapters share them, one copy per device with a byte per value (`uniform8`)
or two bits (`ternary`). An adapter file contains only the scales.

Paper: RandLoRA, arXiv:2502.00987, eq. 4. Column k·n + j of B belongs to the pair (k, j), as in peft's RandLoRA layers,
so adapters can be converted in both directions (`basis="peft"`, `peft_zoo.randlora.from_peft`, `to_peft`).

Cost of an adapted matrix: n·(r + d) ≈ d²/r trained parameters (a *smaller* r trains more); only the input is saved for
the backward pass; a training step takes the least of T·(3d² + 2dD) multiply-adds by tokens, T·dD + 3d²D with the merged
weight, and 3·T·dD + 3d²D with a separate weight. LoRA takes 3·T·r·(d + D).

Use it if LoRA stops improving with its rank: much data, large changes. Prefer LoRA for small parameter budgets, for a
few hundred examples, and if the time of a step is critical.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_zoo.adapters.base import BufferDict, FactorDict, LinearLayout, ZooLayer, ZooModel
from peft_zoo.adapters.base.layer import note_once
from peft_zoo.adapters.base.layout import layout_of
from peft_zoo.adapters.randlora.config import RandLoraConfig
from peft_zoo.adapters.randlora.peft_basis import PeftProjection, draw, usual_dtype
from peft_zoo.kernels.random_matrix.basis import UNIFORM, read_basis, unit
from peft_zoo.kernels.random_matrix.factors import RandLoraFactors, RandLoraSpec
from peft_zoo.kernels.random_matrix.randlora_linear import randlora_linear, randlora_weight, weight_is_cheaper
from peft_zoo.kernels.random_matrix.shared import BasisKey, SharedBasis, shared_basis
from peft_zoo.registration import register

MATRICES = ("zoo_randlora_A", "zoo_randlora_B")  # attributes of the model that hold peft's bases


class RandLoraLayer(ZooLayer):
    """Frozen layer with RandLoRA adapters."""

    adapter_layer_names = ("zoo_randlora_lambda", "zoo_randlora_gamma")
    other_param_names: tuple[str, ...] = ()
    zoo_randlora_lambda: FactorDict
    zoo_randlora_gamma: FactorDict
    configs: dict[str, RandLoraConfig]  # type: ignore[assignment]

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__(base_layer, **quantization)
        self.small, self.large = sorted((self.in_features, self.out_features))
        # Plain attributes: not saved, not moved, and shared by all layers.
        self.bases: dict[str, dict[torch.device, SharedBasis]] = {}
        self.projections: dict[str, PeftProjection] = {}
        self.other_param_names = (*self.other_param_names, "bases", "projections")

    def init_adapter(self, name: str, config: RandLoraConfig) -> None:  # type: ignore[override]
        """Creates λ (r, n) of zeros and γ (n, d) of 1/max(n, d), as peft; without `init_weights` λ is normal."""
        full = math.ceil(self.small / config.r)
        bases = config.num_bases or full
        config.require(
            bases <= full,
            "num_bases",
            f"num_bases * r = {bases * config.r} is more than min(in, out) = {self.small}; use at most {full}",
        )
        if config.r > self.small:
            note_once(
                "RandLoraConfig: r=%d is larger than min(in, out) = %d of a layer, which has one base; use a smaller r "
                "to train more parameters.",
                config.r,
                self.small,
            )
        lambda_, gamma = torch.zeros(config.r, bases), torch.full((bases, self.small), 1 / max(bases, self.small))
        if config.init_weights is False:
            nn.init.normal_(lambda_)
            nn.init.constant_(
                gamma, 1 / (4 * config.scaling * self.small)
            )  # ΔW maps inputs to about a quarter of their norm
        self.zoo_randlora_lambda[name], self.zoo_randlora_gamma[name] = nn.Parameter(lambda_), nn.Parameter(gamma)
        self.bases[name] = {}

    def add_adapter(self, name: str, config: RandLoraConfig, inference_mode: bool = False) -> None:  # type: ignore[override]
        """Creates adapter `name` and the random matrices that its device does not have yet."""
        super().add_adapter(name, config, inference_mode)
        self._prepare(name)
        if config.scaling > 20 and self._get_base_layer_device_and_dtype(self.get_base_layer())[1] == torch.float16:
            note_once(
                "RandLoraConfig: randlora_alpha / r = %g exceeds 20 and the base model is float16: outputs and "
                "gradients may overflow. Use a smaller randlora_alpha, or a bfloat16 or float32 model.",
                config.scaling,
            )

    def initial_scaling(self, config: RandLoraConfig) -> float:  # type: ignore[override]
        """Returns the scale α/r."""
        return config.scaling

    def delta_weight(self, name: str) -> Tensor:
        """Returns ΔW (out, in) in float32."""
        return randlora_weight(self._factors(name), self._spec(name))

    def delta_output(self, name: str, x: Tensor) -> Tensor:
        """Applies ΔW to `x` (..., in), saving only x; layers other than linear form ΔW, twice in training."""
        if not isinstance(self.layout, LinearLayout):
            if torch.is_grad_enabled():
                return checkpoint(super().delta_output, name, x, use_reentrant=False, preserve_rng_state=False)
            return super().delta_output(name, x)
        compute = self.configs[name].compute
        by_weight = self._weight_is_cheaper(name, x, frozen=False) if compute == "auto" else compute != "token"
        return randlora_linear(x, self._factors(name), self._spec(name), by_weight=by_weight)

    def fused_output(self, name: str, x: Tensor) -> Tensor | None:
        """Applies W₀ + ΔW to `x` (..., in), block by block; None if the adapter does not use the merged weight."""
        base: Any = self.base_layer
        config = self.configs[name]
        if base.weight.dtype.itemsize < 4 and not config.allow_merged_low_precision:
            return None
        if config.compute not in ("auto", "merged"):
            return None
        if config.compute == "auto" and not self._weight_is_cheaper(name, x, frozen=True):
            return None
        frozen = {"weight": self.layout.to_base(base.weight), "bias": base.bias}
        spec = self._spec(name, self.scaling[name])
        return randlora_linear(x, self._factors(name), spec, by_weight=True, **frozen)

    def _weight_is_cheaper(self, name: str, x: Tensor, frozen: bool) -> bool:
        """Whether forming the weight costs fewer FLOPs than applying the factors to the tokens of `x`."""
        pairs, tokens = self.zoo_randlora_lambda[name].numel(), x.shape[:-1].numel()
        training = torch.is_grad_enabled()
        return weight_is_cheaper(tokens, pairs, self.in_features, self.out_features, frozen=frozen, training=training)

    def _spec(self, name: str, scale: float = 1.0) -> RandLoraSpec:
        """Shape, scale and workspace of the update for the kernels."""
        config = self.configs[name]
        k = config.kind(self.small)
        scale *= 1.0 if config.is_peft_basis else unit(k) ** 2
        return RandLoraSpec(self.large, self.in_features > self.out_features, scale, k, config.chunk_mb * 2**20)

    def _factors(self, name: str) -> RandLoraFactors:
        """λ and γ in at least float32, and the random matrices A and B of an adapter."""
        factors = self.factor("zoo_randlora_lambda", name), self.factor("zoo_randlora_gamma", name)
        lambda_, gamma = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in factors)
        if name in self.projections:
            return RandLoraFactors(lambda_, gamma, *self.projections[name].matrices(lambda_.device))
        basis = self._basis(name, lambda_)
        config = self.configs[name]
        A = basis.covering(config.r) if config.cover_features else basis.A
        return RandLoraFactors(lambda_, gamma, A, basis.B)

    def _basis(self, name: str, lambda_: Tensor) -> SharedBasis:
        """Shared basis of an adapter on the device of λ, with all rows and columns that this layer needs."""
        basis = self.bases[name].get(lambda_.device)
        if basis is None:
            config = self.configs[name]
            kind = config.kind(self.small)
            smallest = "int8" if kind == UNIFORM else "packed2"
            storage = smallest if config.basis_storage == "auto" else config.basis_storage
            basis = shared_basis(BasisKey(config.projection_prng_key, kind, storage, lambda_.device))
            basis.reserve(A=(config.r, self.small), B=(self.large, lambda_.numel()))
            self.bases[name][lambda_.device] = basis
        return basis

    def _prepare(self, name: str) -> None:
        """Creates the random matrices now, since this cannot be traced into a graph."""
        lambda_ = self.zoo_randlora_lambda[name]
        config = self.configs[name]
        if not config.is_peft_basis and lambda_.device.type != "meta":
            basis = self._basis(name, lambda_)
            if config.cover_features:
                basis.covering(config.r)
                self._check_reached(config, basis, lambda_.numel())

    def _check_reached(self, config: RandLoraConfig, basis: SharedBasis, pairs: int) -> None:
        """Raises a ValueError if a row of B is zero, so that a feature of the layer's larger size is never trained."""
        zeros = 1 - config.kind(self.small) / 128
        if self.large * zeros**pairs > 1e-9:  # the number expected: else decoding B would be a waste
            rows = read_basis(basis.B, config.kind(self.small), self.large, 0, pairs, torch.int8)
            unreached = int((rows == 0).all(1).sum())
            fix = f"{unreached} of {self.large} features would never be trained: use more bases, or basis='uniform8'"
            config.require(unreached == 0, "num_bases", fix)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Moves the layer; random matrices on the old device are released."""
        for held in self.bases.values():
            held.clear()
        result = super()._apply(*args, **kwargs)
        for name in self.bases:
            self._prepare(name)
        return result


@register(
    RandLoraConfig,
    summary="Update of full rank from shared random matrices and trained scales.",
    parameters="⌈d/r⌉·(r + d), d the smaller size",
    memory="4·T·in (the input)",
    flops="6·T·d·D + 6·d²·D merged, 4·T·d·D + T·(6·d² + 4·d·D) by tokens",
    paper="arXiv:2502.00987",
)
class RandLoraModel(ZooModel):
    """Tuner of RandLoRA, as `get_peft_model(model, RandLoraConfig(...))` creates it.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_zoo.randlora import RandLoraConfig, RandLoraModel
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> isinstance(get_peft_model(base, RandLoraConfig(r=2, target_modules=["0"])).base_model, RandLoraModel)
        True
    """

    prefix = "zoo_randlora_"
    tuner_layer_cls = RandLoraLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Injects as peft does; fills `basis_shape` of the model's copy of the configuration."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config, layers = self.peft_config[adapter_name], self._zoo_layers()
        if not config.is_peft_basis:
            config.basis_shape = _largest(
                (layer.out_features, layer.in_features) for layer in layers if adapter_name in layer.scaling
            )

    def _create_and_replace(  # type: ignore[override]
        self,
        config: RandLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        is_new = config.basis_shape is None  # a file has it
        if is_new and config.cover_features is None and config.basis.startswith("ternary"):
            config.cover_features = True
        if config.is_peft_basis:
            self._draw(config, adapter_name)
        super()._create_and_replace(config, adapter_name, target, target_name, parent, *args, **kwargs)
        if config.is_peft_basis:
            layer: Any = getattr(parent, target_name)
            layer.projections[adapter_name] = PeftProjection(self.zoo_randlora_A, self.zoo_randlora_B, adapter_name)

    def _draw(self, config: RandLoraConfig, adapter_name: str) -> None:
        """Draws peft's matrices for an adapter; fills dtype and sizes in the model's copy of the configuration."""
        if all(adapter_name in getattr(self, name, {}) for name in MATRICES):  # drawn for an earlier module
            return
        needed = _largest(self._sizes(config))
        dtype = config.peft_basis_dtype or usual_dtype()
        # `from_peft` leaves the dtype open if no 16-bit dtype represents the matrices of the file exactly.
        is_wide = config.save_projection and config.basis_shape is not None and config.peft_basis_dtype is None
        if not is_wide:
            config.peft_basis_dtype = dtype
        largest, smallest = config.basis_shape = config.basis_shape or needed
        fits = largest >= needed[0] and smallest >= needed[1]
        config.require(fits, "basis_shape", f"the adapted modules need at least {needed}; use None for a new adapter")
        drawn = draw(config.basis, config.r, largest, smallest, config.projection_prng_key, dtype)
        for container, matrix in zip(MATRICES, drawn, strict=True):
            if not hasattr(self, container):
                self.add_module(container, BufferDict())
            matrix = matrix.float() if is_wide else matrix
            getattr(self, container).register_buffer(adapter_name, matrix, persistent=config.saves_projection)

    def _sizes(self, config: RandLoraConfig) -> Iterator[tuple[int, int]]:
        """Yields the sizes `(out, in)` of the modules to adapt."""
        for name, module in self.model.named_modules():
            if self._check_target_module_exists(config, name):
                with suppress(ValueError):  # raised again with the module's name when it is replaced
                    layout = module.layout if isinstance(module, ZooLayer) else layout_of(module, None)
                    if layout is not None:
                        yield layout.out_features, layout.in_features

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter and the matrices that were drawn for it."""
        super().delete_adapter(adapter_name)
        for matrices in (getattr(self, name, {}) for name in MATRICES):
            if adapter_name in matrices:
                del matrices[adapter_name]


def _largest(sizes: Iterable[tuple[int, int]]) -> list[int]:
    """Returns the larger and the smaller of the largest `out` and the largest `in`."""
    return sorted(map(max, zip((1, 1), *sizes, strict=True)), reverse=True)
