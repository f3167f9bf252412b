"""The runtime: in place of one noise prediction, the weighted sum of one for each LoRA.

Guidance is linear in the noise predictions, and so is the sum over adapters: to sum what the denoiser returns, before
guidance, is to sum after it. All of this therefore happens in one place, the forward of the denoiser, and pipelines and
schedulers need not know.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from peft_zoo.adapters.cached_lora.arguments import TIMESTEP, argument_names, call_arguments, noise_level
from peft_zoo.adapters.cached_lora.checks import (
    check_denoiser,
    check_mode,
    check_pipeline,
    denoiser_of,
    unreached,
    unusual,
)
from peft_zoo.adapters.cached_lora.config import CachedLoraConfig
from peft_zoo.adapters.cached_lora.feature_cache import Blocks, find_blocks
from peft_zoo.adapters.cached_lora.layers import AdapterLayers
from peft_zoo.adapters.cached_lora.passes import Call, Passes, form_of
from peft_zoo.adapters.cached_lora.patches import Patches, owner_of
from peft_zoo.adapters.cached_lora.schedule import Planner
from peft_zoo.adapters.cached_lora.steps import Clock, StepTrace, remaining


class Composition:
    """A recipe at work on a denoiser, between `__enter__` and `__exit__`; made by `compose`.

    Args:
        denoiser: The module whose forward predicts the noise.
        config: The recipe.
        scheduler: A scheduler, or what will have one as its attribute `scheduler` when a generation begins; or None.
        num_inference_steps: Calls of the denoiser in a generation.
        pipe: The pipeline of the denoiser, if it has one.

    Attributes:
        denoiser: The module.
        config: The recipe.
        layers: Its LoRAs, as they were found last.
        adapters: Names, in the order in which they take turns.

    Raises:
        ValueError: If the recipe and the denoiser do not go together, before anything is changed.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        config: CachedLoraConfig,
        scheduler: Any = None,
        num_inference_steps: int | None = None,
        pipe: Any = None,
    ) -> None:
        self.denoiser, self.config, self.pipe = denoiser, config, pipe
        self.scheduler, self.num_inference_steps = scheduler, num_inference_steps
        self._outer: Composition | None = None
        self._patches = Patches()
        self._warned: set[str] = set()
        self._context: str | None = None
        self._clock = Clock()
        self._take_stock()
        self.reset()

    def _take_stock(self) -> None:
        """Looks at the denoiser as it is now, says what is wrong with it, and changes nothing about it."""
        check_denoiser(self.denoiser)
        check_pipeline(self.pipe)
        layers = AdapterLayers(self.denoiser)
        roles = self.config.roles(layers.names)
        for warning in unreached(self.pipe, self.denoiser, self.config, roles):
            self._warn(warning)
        dora = sorted(set(layers.with_dora()) & set(roles.order))
        if self.config.batched and dora:
            raise ValueError(f"batched=True cannot be used with DoRA ({dora}), of which peft mixes none: use False.")
        names = argument_names(self.denoiser)
        if not set(TIMESTEP) & set(names):
            raise ValueError(f"{type(self.denoiser).__name__} is no denoiser: its forward has no timestep: {names}.")
        self.layers, self.roles, self.adapters = layers, roles, roles.order
        passes = Passes(self.config, layers, self._find_blocks())
        before: Passes | None = getattr(self, "passes", None)
        if before and before.layers.form == layers.form:
            passes.macs = before.macs
        self.passes = passes

    def reset(self) -> None:
        """Forgets what was cached and traced; the next call of the denoiser begins a generation."""
        self._clock.reset()
        self._begin()

    def trace(self) -> list[StepTrace]:
        """What was done in the last generation, a record for each call of the denoiser.

        Without a scheduler and without `num_inference_steps`, generations of one step each cannot be told from several
        calls of one step, up to eight of them: call `reset` between.
        """
        return list(self._trace)

    # ---- putting in and taking out ----

    def __enter__(self) -> Composition:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.uninstall()

    def install(self) -> None:
        """Takes the place of the denoiser's forward; a composition that is there already waits until `uninstall`.

        Raises:
            ValueError: If this one is there already, or the denoiser is no longer fit for it.
        """
        outer = installed_on(self.denoiser)
        if outer is self:
            raise ValueError("this composition is at work already: call compose() again for another one.")
        self._take_stock()
        if outer:
            outer.uninstall()
        self._outer = outer
        self.layers.remember()
        try:
            self.layers.scale(self._strengths())
            self._patches.put(self.denoiser, "forward", self._forward)
            if hasattr(self.denoiser, "cache_context"):
                self._patches.put(self.denoiser, "cache_context", self._named)
            for module, function in self.passes.blocks.patches() if self.passes.blocks else ():
                self._patches.put(module, "forward", function)
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        """Leaves the denoiser as it was found. The trace stays."""
        self.layers.restore()
        self.passes.forget()
        self._clock.reset()
        outer, self._outer = self._outer, None
        try:
            self._patches.undo()
        finally:
            if outer:
                outer.install()

    def _strengths(self) -> dict[str, float]:
        """By what each adapter's scale is multiplied."""
        weights = self.roles.weights
        if self.config.method == "w_switch":
            return {}  # they are shares of the steps
        if self.config.method == "merge_normalized":
            norms = self.layers.norms(self.adapters)
            mean = sum(norms.values()) / len(norms)
            return {name: weights[name] * mean / norm for name, norm in norms.items()}
        return weights

    def _find_blocks(self) -> Blocks | None:
        """What a cached pass leaves out; None where nothing is cached."""
        if self.config.method != "cmlora" or not self.config.cache or len(self.adapters) == 1:
            return None
        try:
            return find_blocks(self.denoiser)
        except NotImplementedError as error:
            name = type(self.denoiser).__name__
            self._warn(f"{name} cannot be cached: {error}. Every pass is a full one.", 6)
            return None

    def _warn(self, text: str, stacklevel: int = 5) -> None:
        """Warns, once."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=stacklevel)

    # ---- one call of the denoiser ----

    @contextmanager
    def _named(self, method: Callable[..., AbstractContextManager[Any]], name: str, **kwargs: Any) -> Iterator[None]:
        """Stands for `cache_context`, by which pipelines say which of several calls follows."""
        self._context = name
        try:
            with method(name, **kwargs):
                yield
        finally:
            self._context = None

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands for the denoiser's forward."""
        if not self._patches or not self.layers.enabled:
            return forward(*args, **kwargs)
        check_mode(self.denoiser)
        if torch.is_grad_enabled():
            raise ValueError("gradients are on, and a composition has none: use torch.no_grad() or inference_mode().")
        arguments = call_arguments(self.denoiser, args, kwargs)
        timestep, several = noise_level(self.denoiser, arguments)
        if several:
            self._warn("the timesteps of one call differ: the greatest counts as that of the step.")
        try:
            form = form_of(next(iter(arguments.values())))
            schedule = self._schedule()
            mark = schedule if schedule is self._schedule() else None  # one made when asked for marks nothing
            tick = self._clock.tick(timestep, self._context, form, mark, self.num_inference_steps)
            if tick.begins:
                check_denoiser(self.denoiser)
                if AdapterLayers(self.denoiser).form != self.layers.form:
                    raise ValueError("LoRAs came or went since the composition began: make such changes before that.")
                self._begin(schedule)
            progress = self._clock.progress(tick.step, self._total())
            planner = self._planners.setdefault(tick.context, Planner(self.config, self.roles))
            plan = planner.plan(tick.step, progress)
            call = Call(forward, arguments, next(iter(arguments)), tick.context, tick.step)
            output, done = self.passes.run(call, plan, self._may_cache(arguments))
        except BaseException:
            self.reset()
            raise
        now = (tick.step, tick.context, self._clock.last, progress)
        self._trace.append(
            StepTrace(*now, plan.dominant, plan.weights, done.passes, done.ages, done.forwards, done.macs)
        )
        return output

    def _begin(self, schedule: Any = None) -> None:
        """Begins a generation with the timesteps of a scheduler, if there are any."""
        self._planners: dict[str, Planner] = {}
        self._trace: list[StepTrace] = []
        self.passes.forget()
        self._timesteps = [] if schedule is None else [float(t) for t in schedule]

    def _schedule(self) -> Any:
        """The timesteps of the scheduler, which `set_timesteps` makes anew; None if there are none."""
        return getattr(getattr(self.scheduler, "scheduler", self.scheduler), "timesteps", None)

    def _total(self) -> int | None:
        """The number of steps of the generation, if that is known."""
        return self.num_inference_steps or remaining(self._timesteps, self._clock.first, self._clock.rising)

    def _may_cache(self, arguments: Mapping[str, Any]) -> bool:
        if self.passes.blocks is None:
            return False
        reason = unusual(self.denoiser, arguments) or self.passes.too_large
        if reason:
            self._warn(f"{reason}: every pass is a full one.")
        return not reason


def compose(
    target: Any,
    config: CachedLoraConfig | None = None,
    *,
    scheduler: Any = None,
    num_inference_steps: int | None = None,
) -> Composition:
    """Several LoRAs on one denoiser, each with a noise prediction of its own, for as long as the context lasts.

    Args:
        target: A diffusers pipeline, a denoiser with LoRAs on it, or a PeftModel around one.
        config: The recipe; None takes that of `get_peft_model(denoiser, CachedLoraConfig(...))`, or else cmlora with
            all adapters that there are.
        scheduler: Whose timesteps say how far a generation is; a pipeline has its own.
        num_inference_steps: Or the number of calls of the denoiser. With neither, the progress is read off the
            timesteps: `1 - t / first t` where they fall.

    Returns:
        The context manager; with `trace()` for what was done.

    Raises:
        ValueError: If recipe and denoiser do not go together, naming what is wrong and the fix.
    """
    steps = num_inference_steps
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ValueError(f"num_inference_steps={steps!r} cannot be used; use an integer of at least 1.")
    denoiser = denoiser_of(target)
    pipe = None if isinstance(target, nn.Module) else target
    at_work = installed_on(denoiser)
    if config is None:
        config = at_work.config if at_work else CachedLoraConfig()
    return Composition(denoiser, config, pipe if scheduler is None else scheduler, steps, pipe)


def installed_on(denoiser: nn.Module) -> Composition | None:
    """The composition at work on a denoiser."""
    owner = owner_of(denoiser)
    return owner if isinstance(owner, Composition) else None


__all__ = ["Composition", "compose"]
