"""CMLoRA: combines the noise predictions of several LoRAs on one diffusers denoiser and reuses their deep features.

    eps = sum_i alpha_i eps_i           eps_i: noise prediction with LoRA i alone, sum_i alpha_i = 1

`merge` adds the updates to the weights, `switch` activates one LoRA at a time (alpha is one-hot), `composite` takes the
mean (Zhong et al., Multi-LoRA Composition, arXiv 2402.16843). `cmlora` gives one dominant LoRA a larger weight, LoRAs
of high frequencies first, and lets the others reuse their own deep features (CMLoRA, Zou et al., ICLR 2025).

Cost, in forward passes per step with N LoRAs: 1 for merges and switches, N for composite, between 1 and N for cmlora.
If a cached pass costs C and a full one F, T steps with R refreshes cost (R + N - 1) F + (N T - R - N + 1) C. Memory:
one feature per adapter and context. Parameters: none; the configuration is a recipe of names, paths and settings.

Use it to find the rule that suits a set of LoRAs, beginning with `switch` and `merge`. It does not bind a LoRA to an
image region or to a word of the prompt.
"""

import peft_zoo.adapters.cached_lora.model  # noqa: F401 (registers)
from peft_zoo.adapters.cached_lora.composition import compose
from peft_zoo.adapters.cached_lora.config import CachedLoraConfig

__all__ = ["CachedLoraConfig", "compose"]
