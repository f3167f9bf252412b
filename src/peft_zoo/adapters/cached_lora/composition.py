"""Runs a recipe inside the forward of a denoiser, whose noise prediction becomes the weighted sum over its LoRAs.

Guidance is linear in the noise predictions, and so is the sum over adapters: summing what the denoiser returns, before
guidance, equals summing after it. Pipelines and schedulers therefore need no change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from peft_zoo.adapters.cached_lora import checks, passes
from peft_zoo.adapters.cached_lora.config import MERGES, CachedLoraConfig
from peft_zoo.adapters.cached_lora.feature_cache import FeatureCache, feature_cache_for
from peft_zoo.adapters.cached_lora.layers import AdapterLayers
from peft_zoo.adapters.cached_lora.patches import Patches, owner_of
from peft_zoo.adapters.cached_lora.schedule import Planner
from peft_zoo.adapters.cached_lora.steps import Clock, StepTrace, remaining_steps
from peft_zoo.common.checks import check_count


class Composition:
    """Context manager that runs a recipe on a denoiser; made by `compose`, whose arguments it takes.

    Attributes:
        scheduler: Scheduler, or an object whose attribute `scheduler` will be one when a generation begins; or None.
        layers: LoRA layers of the denoiser when it was last validated.
        adapters: Adapter names in the order in which they take turns.
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
        self._scales: Any = None
        self._clock = Clock()
        self._validate_and_bind()
        self.reset()

    def _validate_and_bind(self) -> None:
        """Checks the denoiser as it is now and binds the recipe to its LoRA layers, without changing it."""
        checks.check_denoiser(self.denoiser)
        checks.check_pipeline(self.pipe)
        layers = AdapterLayers(self.denoiser)
        roles = self.config.roles(layers.names)
        for warning in checks.scope_warnings(self.pipe, self.denoiser, self.config, roles):
            self._warn(warning)
        dora = layers.with_dora(roles.order)
        if self.config.batched and dora:
            raise ValueError(f"batched=True cannot be used with DoRA ({dora}), which peft cannot mix: use False.")
        names = passes.argument_names(self.denoiser)
        if not set(passes.TIMESTEP_NAMES) & set(names):
            raise ValueError(f"{type(self.denoiser).__name__} is no denoiser: no timestep in {names}; pass one.")
        self.layers, self.roles, self.adapters = layers, roles, roles.order
        before: passes.Passes | None = getattr(self, "passes", None)
        self.passes = passes.Passes(self.config, layers, self._feature_cache(), len(roles.order))
        if before and before.layers.ranks == layers.ranks:
            self.passes.macs = before.macs

    def reset(self) -> None:
        """Drops features and trace; the next call of the denoiser begins a generation."""
        self._clock.reset()
        self._begin()

    def trace(self) -> list[StepTrace]:
        """Returns a record for each call of the denoiser in the last generation.

        Without a scheduler and without `num_inference_steps`, up to eight generations of one step each count as several
        calls of one step: call `reset` between them.
        """
        return list(self._trace)

    # ---- installing ----

    def __enter__(self) -> Composition:
        self.install()
        return self

    def __exit__(self, *error: object) -> None:
        self.uninstall()

    def install(self) -> None:
        """Overrides the denoiser's forward; a composition installed before pauses until `uninstall`.

        Raises a ValueError if this composition is installed already, or the denoiser does not fit any more.
        """
        outer = installed_on(self.denoiser)
        if outer is self:
            raise ValueError("this composition is installed already: call compose() for another one.")
        self._validate_and_bind()
        if outer:
            outer.uninstall()
        self._outer = outer
        self.layers.remember()
        try:
            self._bind_scales()
            self._patches.put(self.denoiser, "forward", self._forward)
            if hasattr(self.denoiser, "cache_context"):
                self._patches.put(self.denoiser, "cache_context", self._cache_context)
            for module, function in self.passes.cache.overrides() if self.passes.cache else ():
                self._patches.put(module, "forward", function)
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        """Restores the denoiser, and the composition installed before; the trace stays."""
        self.layers.restore()
        self.passes.forget()
        self._clock.reset()
        self._scales = None
        outer, self._outer = self._outer, None
        try:
            self._patches.undo()
        finally:
            if outer:
                outer.install()

    def _bind_scales(self, call: Any = ()) -> None:
        """Applies the recipe's weights to the scales as they are now, and drops features made with other scales.

        `call` are the scales that one call of the denoiser asks for.
        """
        scales = self.layers.scales()
        if [scale.keys() for scale in scales] != [ranks.keys() for _, ranks in self.layers.ranks]:
            raise ValueError("LoRAs were added or removed inside the composition: do that before entering it.")
        if (scales, call) != self._scales:
            self._scales = scales, call
            self.layers.factors = self._scale_factors()
            self.passes.forget_features()

    def _scale_factors(self) -> dict[str, float]:
        """Returns the factor on the scale of each adapter."""
        weights = self.roles.weights
        if self.config.method == "w_switch":
            return {}  # its weights are shares of the steps
        if self.config.method == "merge_normalized":
            norms = self.layers.norms(self.adapters)
            mean = sum(norms.values()) / len(norms)
            return {name: weights[name] * mean / norm for name, norm in norms.items()}
        return weights

    def _feature_cache(self) -> FeatureCache | None:
        """Returns the hooks that cache features, None if the recipe or the denoiser does not allow caching."""
        if self.config.method != "cmlora" or not self.config.cache or len(self.adapters) == 1:
            return None
        try:
            return feature_cache_for(self.denoiser)
        except NotImplementedError as error:
            self._warn(f"{type(self.denoiser).__name__} cannot be cached: {error}. Every pass is a full one.", 6)
            return None

    def _warn(self, text: str, stacklevel: int = 5) -> None:
        """Warns, once for each text."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=stacklevel)

    # ---- one call of the denoiser ----

    @contextmanager
    def _cache_context(
        self, method: Callable[..., AbstractContextManager[Any]], name: str, **kwargs: Any
    ) -> Iterator[None]:
        """Overrides `cache_context`, by which pipelines name the calls of one step."""
        self._context = name
        try:
            with method(name, **kwargs):
                yield
        finally:
            self._context = None

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Overrides the denoiser's forward."""
        if not self._patches or not self.layers.enabled:
            return forward(*args, **kwargs)
        checks.check_mode(self.denoiser)
        if torch.is_grad_enabled():
            raise ValueError("gradients are enabled, and a composition has none: use torch.no_grad().")
        arguments = passes.call_arguments(self.denoiser, args, kwargs)
        if len(self.adapters) > 1 and self.config.method not in MERGES:
            checks.refuse_cached_keys(arguments)
        timestep, several = passes.noise_level(self.denoiser, arguments)
        if several:
            self._warn("the timesteps of one call differ: the largest counts as that of the step.")
        try:
            self._bind_scales(passes.call_scales(arguments))
            output, step = self._run(forward, arguments, timestep)
        except BaseException:
            self.reset()
            raise
        self._trace.append(step)
        return output

    def _run(self, forward: Callable[..., Any], arguments: dict[str, Any], timestep: float) -> tuple[Any, StepTrace]:
        """Composes one call of the denoiser; returns its output and record."""
        schedule = self._schedule()
        # A property that makes new timesteps on every access does not mark a generation.
        mark = schedule if schedule is self._schedule() else None
        steps = self.num_inference_steps
        info = self._clock.observe(timestep, self._context, passes.sample_spec(arguments), mark, steps)
        if info.begins:
            checks.check_denoiser(self.denoiser)
            if AdapterLayers(self.denoiser).ranks != self.layers.ranks:
                raise ValueError("LoRAs were added or removed inside the composition: do that before entering it.")
            self._begin(schedule)
        total = steps or remaining_steps(self._timesteps, self._clock.first, self._clock.rising)
        progress = self._clock.progress(info.step, total)
        planner = self._planners.setdefault(info.context, Planner(self.config, self.roles))
        plan = planner.plan(info.step, progress)
        output, stats = self.passes.run(forward, arguments, info, plan, self._may_cache(arguments))
        place = (info.step, info.context, timestep, progress, plan.dominant, plan.weights)
        return output, StepTrace(*place, **vars(stats))

    def _begin(self, schedule: Any = None) -> None:
        """Begins a generation with the timesteps of a scheduler, if there is one."""
        self._planners: dict[str, Planner] = {}
        self._trace: list[StepTrace] = []
        self.passes.forget()
        self._timesteps = [] if schedule is None else [float(t) for t in schedule]

    def _schedule(self) -> Any:
        """Returns the scheduler's timesteps, a new object after each `set_timesteps`; None without a scheduler."""
        return getattr(getattr(self.scheduler, "scheduler", self.scheduler), "timesteps", None)

    def _may_cache(self, arguments: Mapping[str, Any]) -> bool:
        """Returns whether features of a call may be cached; warns if not."""
        if self.passes.cache is None:
            return False
        reason = checks.why_not_cacheable(self.denoiser, arguments) or self.passes.not_cacheable
        if reason:
            self._warn(f"{reason}: every pass is a full one.", 6)
        return not reason


def compose(
    target: Any,
    config: CachedLoraConfig | None = None,
    *,
    scheduler: Any = None,
    num_inference_steps: int | None = None,
) -> Composition:
    """Returns a context manager in which a denoiser combines the noise predictions of several LoRAs.

    Args:
        target: Diffusers pipeline, denoiser with LoRAs, or PeftModel around one.
        config: The recipe, never changed. None takes that of `get_peft_model(denoiser, CachedLoraConfig(...))`, or
            cmlora with all LoRAs on the denoiser.
        scheduler: Scheduler whose timesteps give the progress of a generation; default that of the pipeline.
        num_inference_steps: Number of calls of the denoiser in a generation. Without it and without a scheduler,
            progress is read off the timesteps, `1 - t / first t` if they fall.

    Returns:
        The context manager, whose `trace()` has a record for each call of the denoiser.

    Raises:
        ValueError: If recipe and denoiser do not fit; names the problem and the fix.

    Examples:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_zoo import CachedLoraConfig, compose
        >>> blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
        >>> unet = UNet2DModel(8, block_out_channels=(8, 8), norm_num_groups=2, **blocks)
        >>> tuned = get_peft_model(unet, LoraConfig(target_modules=["conv1"]), "knight")
        >>> tuned.add_adapter("watercolour", LoraConfig(target_modules=["conv1"]))
        >>> recipe = CachedLoraConfig(adapters=["knight", "watercolour"], method="composite")
        >>> with torch.no_grad(), compose(tuned.eval(), recipe) as composition:
        ...     noise = tuned(torch.randn(1, 3, 8, 8), timestep=500).sample
        >>> composition.trace()[0].weights
        {'knight': 0.5, 'watercolour': 0.5}
    """
    check_count("num_inference_steps", num_inference_steps)
    denoiser = checks.denoiser_of(target)
    pipe = None if isinstance(target, nn.Module) else target
    if config is None:
        installed = installed_on(denoiser)
        config = installed.config if installed else CachedLoraConfig()
    return Composition(denoiser, config, pipe if scheduler is None else scheduler, num_inference_steps, pipe)


def installed_on(denoiser: nn.Module) -> Composition | None:
    """Returns the composition installed on a denoiser, or None."""
    owner = owner_of(denoiser)
    return owner if isinstance(owner, Composition) else None
