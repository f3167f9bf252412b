"""Results of a training run, for the summary, `summary.json` and the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

RELOAD_TOLERANCE = 1e-6  # relative, on the loss: the same weights on the same machine
MERGE_TOLERANCE = 1e-4  # relative, on the loss: every merged weight was rounded once
STAGES = {"before": "before", "after": "after training", "reloaded": "after reload", "merged": "after reload + merge"}


class Score(NamedTuple):
    """The task's metric, and the mean loss; losses show if two models are equal, since a metric may be too coarse."""

    value: float
    loss: float


@dataclass
class Outcome:
    """Results of one training run.

    Attributes:
        task, method, model, data: Names, given by the user or chosen by the task.
        metric: Name of the metric, such as `"perplexity"`.
        higher_is_better: Whether a higher value of the metric is better.
        note: Remark on the scores for readers; may be empty.
        settings: All settings of the run.
        scores: Score on the test split by stage, a key of `STAGES`.
        losses: Pairs of optimizer step and training loss.
        trainable_parameters, total_parameters: Counts, in elements.
        adapter_bytes: Size of `adapter_model.safetensors`.
        seconds: Wall-clock time of each stage, of `load` and `train`, and of `all`.
        peak_memory_bytes: Peak resident memory of the process; 0 on Windows, which does not report it.
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
        """Whether training improved the metric."""
        before, after = self.scores["before"].value, self.scores["after"].value
        return after > before if self.higher_is_better else after < before

    @property
    def reload_matches(self) -> bool:
        """Whether the saved adapter on a fresh base has the trained model's loss up to `RELOAD_TOLERANCE`."""
        return self._same_loss("reloaded", RELOAD_TOLERANCE)

    @property
    def merge_matches(self) -> bool:
        """Whether the merged model has the loss of the trained model, up to rounding."""
        return self._same_loss("merged", MERGE_TOLERANCE)

    def summary(self) -> dict[str, Any]:
        """Returns the results as plain JSON values."""
        scores = {stage: score._asdict() for stage, score in self.scores.items()}
        checks = {"improved": self.improved, "reload_matches": self.reload_matches, "merge_matches": self.merge_matches}
        return {**asdict(self), "scores": scores, "checks": checks}

    def _same_loss(self, stage: str, tolerance: float) -> bool:
        loss, reference = self.scores[stage].loss, self.scores["after"].loss
        return abs(loss - reference) <= tolerance * abs(reference)
