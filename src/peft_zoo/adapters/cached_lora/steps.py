"""Where a generation stands, read off the calls of the denoiser alone, and the record of what was done at each."""

from __future__ import annotations

from dataclasses import dataclass

MOST_CALLS = 8  # with one timestep; more of them are generations of one step each
TRAINED = 1000.0  # noise levels, of every model that is told the number of one


@dataclass(frozen=True)
class StepTrace:
    """What was done at one call of the denoiser.

    Attributes:
        step: Number of the step, from 0; of the call, for a scheduler that calls twice a step.
        context: Name that the pipeline gives the call (`cond`, `uncond`), or its number among those of a step.
        timestep: As the denoiser got it; the greatest, where tokens have their own.
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
    apart by how many come with the first timestep of a generation.

    A generation begins with another schedule, which a scheduler makes for each, and with a sample of another form in
    the same context. Else it begins where timesteps turn round: most models count them down, some (Lumina, Mochi) and
    every inversion up, as the first two that differ show.

    Attributes:
        first: Timestep with which the generation began.
        last: Timestep of the last call.
        rising: Whether timesteps go up; None as long as that is not known.
    """

    def __init__(self) -> None:
        self._schedule: object = None
        self.reset()

    def reset(self) -> None:
        """Lets the next call begin a generation."""
        self.rising: bool | None = None
        self._restart(0.0)

    def _restart(self, timestep: float, turned: bool = False) -> None:
        self.first = self.last = timestep
        self._turned = turned
        self._counts: dict[str, int] = {}
        self._forms: dict[str, object] = {}
        self._branch = self._branches = 0

    def tick(
        self, timestep: float, name: str | None, form: object = None, schedule: object = None, steps: int | None = None
    ) -> Tick:
        """Takes note of a call.

        Args:
            timestep: As the denoiser gets it.
            name: Of the context, if the pipeline gives one.
            form: Shape, dtype and device of the sample.
            schedule: The object that is another one in the next generation, if there is a scheduler.
            steps: How many calls of one context a generation has, if that is known.
        """
        if schedule is not self._schedule:
            self.reset()
        self._schedule = schedule  # kept, or another could be made in its place in memory
        context = name or self._unnamed(timestep)
        apart = not self._counts or self._again(timestep, name, steps) or self._forms.get(context, form) != form
        turned = not apart and self._turns(timestep)
        if apart or turned:
            self._restart(timestep, turned)
            context = name or self._unnamed(timestep)
        self.last = timestep
        step = self._counts.get(context, 0)
        self._counts[context], self._forms[context] = step + 1, form
        return Tick(context, step, apart or turned)

    def _again(self, timestep: float, name: str | None, steps: int | None) -> bool:
        """Whether a call at the only timestep there was is no further call of that step."""
        most = 1 if steps == 1 else MOST_CALLS
        return timestep == self.first == self.last and (name in self._counts or self._branches > most)

    def _turns(self, timestep: float) -> bool:
        """Whether timesteps go back.

        Before their direction is known they may go up from noise, 0 or 1, or where a schedule says what belongs
        together. If they went back a call ago, it was the direction that changed: an inversion follows a generation.
        """
        if timestep == self.last:
            return False
        rising = timestep > self.last
        may_rise = self._schedule is not None or self.first == 0 or self.first <= 1 < timestep
        if (self.rising is None and (may_rise or not rising)) or (self._turned and self.first == self.last):
            self.rising = rising
        return rising != self.rising

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
        if total:
            share = step / total
        else:
            end = (1.0 if self.last <= 1 else max(self.last, TRAINED)) if self.rising else 0.0
            share = (self.last - self.first) / (end - self.first) if self.last != self.first != end else 0.0
        return min(max(share, 0.0), 1 - 1e-9)


def remaining(timesteps: list[float], first: float, rising: bool | None = None) -> int | None:
    """How many of a scheduler's timesteps a generation has that begins with the timestep `first`.

    A generation from a picture begins later than the first. Some pipelines divide timesteps by a thousand, and some
    count them from the other end.

    Args:
        timesteps: Of the scheduler.
        first: As the denoiser got it.
        rising: Whether those that the denoiser gets go up; None if that is not known.
    """
    if not timesteps:
        return None
    if first == timesteps[0]:
        return len(timesteps)
    scaled = first * TRAINED if first <= 1 < max(timesteps) else first
    if rising is not None and rising != (timesteps[0] < timesteps[-1]):
        scaled = TRAINED - scaled
    # Where schedulers of second order have one twice, a generation from a picture begins with the later.
    start = min(reversed(range(len(timesteps))), key=lambda place: abs(timesteps[place] - scaled))
    return len(timesteps) - start


__all__ = ["StepTrace"]
