"""Steps of a generation, counted from the calls of the denoiser alone, and the record of each call."""

from __future__ import annotations

from dataclasses import dataclass

MOST_CALLS = 8  # calls with one timestep; more of them are generations of one step each
TRAINED = 1000.0  # number of noise levels of all models whose timestep is an index


@dataclass(frozen=True)
class StepTrace:
    """Record of one call of the denoiser.

    Attributes:
        step: Index of the step, from 0; with a scheduler of second order, index of the call.
        context: Name that the pipeline gives to the call (`cond`, `uncond`), or its index among the calls of the step.
        timestep: Timestep of the call; the largest one if tokens have their own.
        progress: Completed share of the generation, in [0, 1).
        dominant: Name of the adapter with the largest weight, None if the method has none.
        weights: Factor of each adapter's noise prediction; 1 for each adapter of a merge.
        passes: `full` or `cached` for each adapter that ran.
        ages: Age in steps of each reused feature, by adapter.
        forwards: Number of passes through the denoiser, full or cached.
        macs: Multiply-accumulates of all passes in matrix products, convolutions and attention.
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
class StepInfo:
    """One call of the denoiser: its context, the index of its step, and whether it begins a generation."""

    context: str
    step: int
    begins: bool


class Clock:
    """Counts the calls of a denoiser.

    Each call of one context is a step, so that the two calls of Heun at one timestep are two steps. Contexts without a
    name are numbered by how many calls have the first timestep of a generation.

    A generation begins when the scheduler has new timesteps, or when a context gets a sample of another shape, dtype or
    device. Otherwise it begins where the timesteps change direction: they fall for most models, and rise for some
    (Lumina, Mochi) and in every inversion; the first two that differ decide. `rising` is None until that is known.
    """

    def __init__(self) -> None:
        self._schedule: object = None
        self.reset()

    def reset(self) -> None:
        """Makes the next call begin a generation."""
        self.rising: bool | None = None
        self._restart(0.0)

    def _restart(self, timestep: float, turned: bool = False) -> None:
        """Begins a generation at its first timestep; `turned` if the timesteps have changed direction."""
        self.first = self.last = timestep
        self._turned = turned
        self._counts: dict[str, int] = {}
        self._specs: dict[str, object] = {}
        self._branch = self._branches = 0

    def observe(
        self, timestep: float, name: str | None, spec: object = None, schedule: object = None, steps: int | None = None
    ) -> StepInfo:
        """Counts a call and returns its place in the generation.

        `name` is None if the pipeline gives none; `spec` is shape, dtype and device of the sample; `schedule` an object
        that is replaced for each generation, or None; `steps` the number of calls of one context, if known.
        """
        if schedule is not self._schedule:
            self.reset()
        self._schedule = schedule  # kept alive, or a new schedule could get the same id
        context = name or self._unnamed(timestep)
        apart = not self._counts or self._repeats(timestep, name, steps) or self._specs.get(context, spec) != spec
        turned = not apart and self._turns(timestep)
        if apart or turned:
            self._restart(timestep, turned)
            context = name or self._unnamed(timestep)
        self.last = timestep
        step = self._counts.get(context, 0)
        self._counts[context], self._specs[context] = step + 1, spec
        return StepInfo(context, step, apart or turned)

    def _repeats(self, timestep: float, name: str | None, steps: int | None) -> bool:
        """Returns whether a call with the only timestep so far begins another generation of one step."""
        most = 1 if steps == 1 else MOST_CALLS
        return timestep == self.first == self.last and (name in self._counts or self._branches > most)

    def _turns(self, timestep: float) -> bool:
        """Returns whether timesteps change direction, which begins a generation.

        Until their direction is known they may rise from noise at 0 or 1, or under a schedule, which says which calls
        belong together. A second change right after the first one means that the direction itself changed, as when an
        inversion follows a generation.
        """
        if timestep == self.last:
            return False
        rising = timestep > self.last
        may_rise = self._schedule is not None or self.first == 0 or self.first <= 1 < timestep
        if (self.rising is None and (may_rise or not rising)) or (self._turned and self.first == self.last):
            self.rising = rising
        return rising != self.rising

    def _unnamed(self, timestep: float) -> str:
        """Returns the index of a call among the calls of its step."""
        if timestep == self.first:
            self._branch = self._branches
            self._branches += 1
        elif timestep != self.last:
            self._branch = 0
        else:
            self._branch = (self._branch + 1) % max(1, self._branches)
        return str(self._branch)

    def progress(self, step: int, total: int | None) -> float:
        """Returns the completed share; without a `total` it is read off the timesteps, assuming even spacing."""
        if total:
            share = step / total
        else:
            end = (1.0 if self.last <= 1 else max(self.last, TRAINED)) if self.rising else 0.0
            share = (self.last - self.first) / (end - self.first) if self.last != self.first != end else 0.0
        return min(max(share, 0.0), 1 - 1e-9)


def remaining_steps(timesteps: list[float], first: float, rising: bool | None = None) -> int | None:
    """Returns how many of a scheduler's timesteps belong to a generation that begins with the timestep `first`.

    Image-to-image begins later than the first timestep. Some pipelines divide timesteps by 1000, and some subtract them
    from the largest. `rising` says whether those of the denoiser rise, if known. No timesteps give None.
    """
    if not timesteps:
        return None
    if first == timesteps[0]:
        return len(timesteps)
    scaled = first * TRAINED if first <= 1 < max(timesteps) else first
    if rising is not None and rising != (timesteps[0] < timesteps[-1]):
        scaled = TRAINED - scaled
    # Schedulers of second order repeat a timestep; image-to-image begins with the later one.
    start = min(reversed(range(len(timesteps))), key=lambda place: abs(timesteps[place] - scaled))
    return len(timesteps) - start
