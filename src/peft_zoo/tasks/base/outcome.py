"""What a run did: the numbers behind the summary, `summary.json` and the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

RELOAD_TOLERANCE = 1e-6  # relative, on the loss: the same weights on the same machine
MERGE_TOLERANCE = 1e-4  # relative, on the loss: every merged weight was rounded once
STAGES = {"before": "before", "after": "after training", "reloaded": "after reload", "merged": "after reload + merge"}


class Score(NamedTuple):
    """One evaluation.

    Attributes:
        value: The task's metric.
        loss: Mean loss; continuous, hence what equality is checked on.
    """

    value: float
    loss: float


@dataclass
class Outcome:
    """One run.

    Attributes:
        task, method, model, data: Names, as the user gave them or as the task chose.
        metric: What the scores are, as in `"perplexity"`.
        higher_is_better: Which way the metric improves.
        note: A remark on the scores; may be empty.
        settings: Every setting of the run.
        scores: Score on the test split by stage, a key of `STAGES`.
        losses: Pairs of optimizer step and training loss.
        trainable_parameters, total_parameters: Counts, in elements.
        adapter_bytes: Size of `adapter_model.safetensors`.
        seconds: Wall-clock time by stage, of `load` and `train`, and of `all`.
        peak_memory_bytes: Peak resident memory of the process; 0 where the system does not tell.
    """

    task: str
    method: str
    model: str
    data: str
    metric: str
    higher_is_better: bool
    note: str
    settings: dict[str, Any]
    scores: dict[str, Score] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)
    trainable_parameters: int = 0
    total_parameters: int = 0
    adapter_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0

    @property
    def improved(self) -> bool:
        """Whether training moved the metric the right way."""
        before, after = self.scores["before"].value, self.scores["after"].value
        return after > before if self.higher_is_better else after < before

    @property
    def reload_matches(self) -> bool:
        """Whether the saved adapter on a fresh base gives the loss of the trained one."""
        return self._same_loss("reloaded", RELOAD_TOLERANCE)

    @property
    def merge_matches(self) -> bool:
        """Whether the merged model gives the loss of the adapted one, to rounding."""
        return self._same_loss("merged", MERGE_TOLERANCE)

    def summary(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        scores = {stage: score._asdict() for stage, score in self.scores.items()}
        checks = {"improved": self.improved, "reload_matches": self.reload_matches, "merge_matches": self.merge_matches}
        return {**asdict(self), "scores": scores, "checks": checks}

    def _same_loss(self, stage: str, tolerance: float) -> bool:
        loss, reference = self.scores[stage].loss, self.scores["after"].loss
        return abs(loss - reference) <= tolerance * abs(reference)
