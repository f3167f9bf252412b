"""Test perplexity of RandLoRA and LoRA with equally many trained parameters, at a small and at a large budget.

    python -m benchmarks.randlora.study --steps 96 --seeds 0,1,2

SmolLM2-135M is trained on worked answers of GSM8K (the excerpt in the package) and evaluated by perplexity on held-out
problems, with adapters on all linear layers. In RandLoRA a smaller r trains more parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import study
from benchmarks.study import Recipe

LORA_RATES, RANDLORA_RATES = (0.0003, 0.001, 0.003, 0.01), (0.0001, 0.0003, 0.001)
RECIPES = {
    "LoRA r=8": Recipe("lora", {"r": "8", "lora_alpha": "8"}, LORA_RATES),
    "RandLoRA r=23": Recipe("randlora", {"r": "23"}, RANDLORA_RATES),
    "LoRA r=57": Recipe("lora", {"r": "57", "lora_alpha": "57"}, LORA_RATES),
    "RandLoRA r=3": Recipe("randlora", {"r": "3"}, RANDLORA_RATES),
}


def main(arguments: Sequence[str] | None = None) -> int:
    return study.main("randlora", __doc__, RECIPES, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
