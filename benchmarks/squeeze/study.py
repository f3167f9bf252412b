"""Compares squeezed LoRAs with LoRAs trained at the final rank, at equal steps and final size.

    python -m benchmarks.squeeze.study --steps 96 --rates 0.0003,0.001,0.003 --seeds 0,1,2

SmolLM2-135M learns the worked answers of GSM8K (the excerpt that ships with the package), scored by perplexity on
held-out problems. Every recipe ends at rank 8 on all linear layers:

    direct      rank 8 from the start
    post        rank 64, squeezed once after the last step
    cont        rank 64, squeezed after 75 % of the steps
    in          64 -> 32 -> 16 -> 8, a quarter of the steps each
    rank 64     the run of `post` before its squeeze
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from benchmarks import study
from benchmarks.study import Recipe, perplexity
from peft_zoo.merge.squeeze.api import squeeze_model
from peft_zoo.tasks.base.task import Task

FINAL = 8
SHARED = {"target_rank": str(FINAL), "min_stage_steps": "1"}
RECIPES = {
    "direct": Recipe("squeeze_lora", {"r": str(FINAL), "lora_alpha": str(FINAL)}),
    "post": Recipe("squeeze_lora", {"r": "64", "lora_alpha": "64"}),
    "cont": Recipe("squeeze_lora", {"r": "64", "lora_alpha": "64", "num_stages": "1", **SHARED}),
    "in": Recipe("squeeze_lora", {"r": "64", "lora_alpha": "64", "num_stages": "3", **SHARED}),
}


def score(recipe: str, task: Task, model: Any, held_out: Dataset[Any]) -> dict[str, float]:
    """Perplexity by row of the table; for `post` also before its squeeze, as `rank 64`."""
    if recipe != "post":
        return perplexity(recipe, task, model, held_out)
    before = perplexity("rank 64", task, model, held_out)
    squeeze_model(model, rank=FINAL)
    return {**perplexity(recipe, task, model, held_out), **before}


def main(arguments: Sequence[str] | None = None) -> int:
    return study.main("squeeze", __doc__, RECIPES, arguments, score)


if __name__ == "__main__":
    raise SystemExit(main())
