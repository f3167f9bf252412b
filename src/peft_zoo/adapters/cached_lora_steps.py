"""Where a generation stands, read off the calls of the denoiser alone, and the record of what was done at each."""

from __future__ import annotations

from dataclasses import dataclass

MOST_CALLS = 8  # with one timestep; more of them are generations of one step each


@dataclass(frozen=True)
class StepTrace:
    """What was done at one call of the denoiser.

    Attributes:
        step: Number of the step, from 0; of the call, for a scheduler that calls twice a step.
        context: Name that the pipeline gives the call (`cond`, `uncond`), or its number among those of a step.
        timestep: As the denoiser got it.
        progress: Share of the generation that lay behind, in [0, 1).
        dominant: The adapter that counted most, where one does.
        weights: Factor of each adapter's noise prediction; in a merge all act in one, and each factor is 1.
        passes: For each adapter that ran, `full` or `cached`.
        ages: Of each feature that was used again, the steps since it was computed.
        forwards: Passes through the denoiser, whole or cached.
        macs: Multiply-accumulates of all of them in matrix products, convolutions and attention.
    """

    step: int
    context: str
    timestep: float
    progress: float
    dominant: str | None
    weights: dict[str, float]
    passes: dict[str, str]
    ages: dict[str, int]
    forwards: int
    macs: int


@dataclass(frozen=True)
class Tick:
    """One call of the denoiser: its context, the number of its step, and whether a generation begins with it."""

    context: str
    step: int
    begins: bool


class Clock:
    """Numbers the calls of a denoiser.

    Every call of one context is a step, so that Heun's two calls at one timestep are two. Calls without a name are told
    apart by how many come with the first timestep of a generation. A timestep that goes up begins a new one, and so
    does a sample of another form in the same context.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Lets the next call begin a generation."""
        self.first = self.last = 0.0
        self._counts: dict[str, int] = {}
        self._forms: dict[str, object] = {}
        self._branch = self._branches = 0

    def tick(self, timestep: float, name: str | None, form: object = None) -> Tick:
        """Takes note of a call.

        Args:
            timestep: As the denoiser gets it.
            name: Of the context, if the pipeline gives one.
            form: Shape, dtype and device of the sample.
        """
        again = timestep == self.first == self.last and (name in self._counts or self._branches == MOST_CALLS)
        begins = not self._counts or timestep > self.last or again
        if not begins:
            context = name or self._unnamed(timestep)
            begins = self._forms.get(context, form) != form
        if begins:
            self.reset()
            self.first = timestep
            context = name or self._unnamed(timestep)
        self.last = timestep
        step = self._counts.get(context, 0)
        self._counts[context], self._forms[context] = step + 1, form
        return Tick(context, step, begins)

    def _unnamed(self, timestep: float) -> str:
        if timestep == self.first:
            self._branch = self._branches
            self._branches += 1
        elif timestep != self.last:
            self._branch = 0
        else:
            self._branch = (self._branch + 1) % max(1, self._branches)
        return str(self._branch)

    def progress(self, step: int, total: int | None) -> float:
        """Share of the generation that lies behind.

        Args:
            step: Number of the step.
            total: Of the steps; None reads the share off the timesteps, which suits those that are evenly spaced.
        """
        share = step / total if total else 1 - self.last / self.first if self.first else 0.0
        return min(max(share, 0.0), 1 - 1e-9)


def remaining(timesteps: list[float], first: float) -> int | None:
    """How many of a scheduler's timesteps a generation has that begins with the timestep `first`.

    A generation from a picture begins later than the first. Some pipelines divide timesteps by a thousand.
    """
    if not timesteps:
        return None
    scaled = first * 1000 if first <= 1 < max(timesteps) else first
    start = min(range(len(timesteps)), key=lambda place: abs(timesteps[place] - scaled))
    return len(timesteps) - start


__all__ = ["StepTrace"]
