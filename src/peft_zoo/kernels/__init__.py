"""Operators and numerical functions on tensors, independent of peft and of any model.

Each family of methods has a folder; `base` holds what several of them share. An operator has a definition in plain
PyTorch, a PyTorch path for every device, and, where it pays, Triton kernels for NVIDIA GPUs. `docs/kernels.md` lists
all public functions and explains `PEFT_ZOO_KERNELS`, which chooses between the paths.
"""

from peft_zoo.common.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "peft_zoo.kernels.base.kernel_spec": ["KernelSpec"],
        "peft_zoo.kernels.lora.merge": ["merge_lora"],
        "peft_zoo.kernels.low_rank.factored": ["factored_svd", "project_outputs", "truncate_factors"],
        "peft_zoo.kernels.low_rank.randomized": ["LinearMap", "randomized_svd", "truncate_dense"],
        "peft_zoo.kernels.normal_float.linear": ["nf_linear", "nf_merge"],
        "peft_zoo.kernels.normal_float.quantize": ["NFConfig", "dequantize", "quantize"],
        "peft_zoo.kernels.planning.knapsack": ["allocate"],
        "peft_zoo.kernels.planning.ranks": ["RankTarget", "Spectrum", "plan_ranks"],
        "peft_zoo.kernels.snell.linear": ["kernelized_linear"],
        "peft_zoo.kernels.snell.weight": ["kernelized_merge", "kernelized_threshold", "kernelized_weight"],
        "peft_zoo.kernels.sparse.linear": ["masked_linear"],
        "peft_zoo.kernels.sparse.mask": ["apply_mask", "apply_threshold", "density_mask", "magnitude_mask", "n_m_mask"],
        "peft_zoo.kernels.sparse.support": ["add_support_", "gather_support", "scatter_support", "support"],
        "peft_zoo.kernels.sparse.threshold": ["magnitude_threshold"],
    },
)
