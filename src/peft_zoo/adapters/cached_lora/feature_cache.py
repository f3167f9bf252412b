"""Stores deep features of a denoiser in one pass and reuses them in a shorter one.

UNet: stores the input of the last up block. A cached pass runs `conv_in`, the first down block without its downsampler,
the last up block and `conv_out`; nothing in between runs (DeepCache, Ma et al., CVPR 2024).

Transformer: stores what all blocks after the first add to its output. A cached pass runs the first block and adds it,
like diffusers' FirstBlockCache, which decides by a threshold where the recipe has a schedule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

Features = tuple[Tensor | None, ...]
Mode = Literal["off", "store", "replay"]
Override = tuple[nn.Module, Callable[..., Any]]

#: Attributes in which diffusers' transformers keep their blocks.
BLOCK_LISTS = (
    "blocks",
    "transformer_blocks",
    "single_transformer_blocks",
    "layers",
    "visual_transformer_blocks",
    "temporal_transformer_blocks",
)


class FeatureCache:
    """Overrides of the forwards of a denoiser's blocks.

    Attributes:
        mode: `store` writes the features of a pass to `features`, `replay` reads them from there, `off` does neither.
        features: Tensors with the batch as their first dimension.
    """

    def __init__(self) -> None:
        self.mode: Mode = "off"
        self.features: Features | None = None

    def overrides(self) -> Iterator[Override]:
        """Yields modules with the function to run instead of their forward, which is its first argument."""
        raise NotImplementedError


class UnetFeatureCache(FeatureCache):
    """Feature cache of a UNet; raises NotImplementedError if the blocks are not connected in the usual way."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.down, self.up, self.mid = list(unet.down_blocks), list(unet.up_blocks), unet.mid_block
        is_usual = all(hasattr(block, "resnets") and not hasattr(block, "skip_conv") for block in self.down)
        if len(self.down) < 2 or not is_usual or not self.down[0].downsamplers:
            raise NotImplementedError("it needs two or more down blocks with resnets and a downsampler in the first")

    def overrides(self) -> Iterator[Override]:
        """See `FeatureCache`."""
        yield self.down[0].downsamplers[0], self._skip
        yield from ((block, partial(self._skip_down, block)) for block in self.down[1:])
        if self.mid is not None:
            yield self.mid, self._skip
        yield from ((block, self._skip) for block in self.up[:-1])
        yield self.up[-1], self._last_up

    def _skip(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _first_argument(args, kwargs) if self.mode == "replay" else forward(*args, **kwargs)

    def _skip_down(self, block: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replaces a down block in a replayed pass by its input, also in place of each skip connection."""
        if self.mode != "replay":
            return forward(*args, **kwargs)
        hidden = _first_argument(args, kwargs)
        num_skips = len(block.resnets) + len(block.downsamplers or ())  # the UNet counts them, and reads none
        return hidden, (hidden,) * num_skips

    def _last_up(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stores the input of the last up block, or replays the stored one."""
        if self.mode == "store":
            self.features = (_first_argument(args, kwargs),)
        elif self.mode == "replay" and self.features:
            if args:
                args = (self.features[0], *args[1:])
            else:
                kwargs["hidden_states"] = self.features[0]
        return forward(*args, **kwargs)


class TransformerFeatureCache(FeatureCache):
    """Feature cache of a diffusion transformer.

    Raises NotImplementedError if it has fewer than two blocks, or blocks that diffusers' registry lacks.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        try:  # since diffusers 0.35; no public module defines the registry, so take it from one that uses it
            from diffusers.hooks.first_block_cache import TransformerBlockRegistry  # type: ignore[attr-defined]
        except ImportError as error:
            raise NotImplementedError("install diffusers 0.35 or later to cache features") from error
        lists = (part for name, part in transformer.named_children() if name in BLOCK_LISTS)
        blocks = [block for part in lists if isinstance(part, nn.ModuleList) for block in part]
        if len(blocks) < 2:
            raise NotImplementedError("it has fewer than two transformer blocks in a list")
        try:
            self.blocks = [(block, _BlockOutput(TransformerBlockRegistry.get(type(block)), block)) for block in blocks]
        except ValueError as error:
            raise NotImplementedError("diffusers' TransformerBlockRegistry lacks one of its blocks") from error
        self._head: Features = ()

    def overrides(self) -> Iterator[Override]:
        """See `FeatureCache`."""
        for place, (block, output) in enumerate(self.blocks):
            run = self._first if place == 0 else self._last if place == len(self.blocks) - 1 else self._skip
            yield block, partial(run, output)

    def _first(self, block: _BlockOutput, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if self.mode == "store":
            self._head = block.streams(output)
        if self.mode != "replay" or not self.features:
            return output
        pairs = zip(block.streams(output), self.features, strict=True)
        return block.packed(output, *(a if a is None or b is None else a + b for a, b in pairs))

    def _skip(self, block: _BlockOutput, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.mode != "replay" else block.passed_through(args, kwargs)

    def _last(self, block: _BlockOutput, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = self._skip(block, forward, *args, **kwargs)
        if self.mode == "store":
            pairs = zip(block.streams(output), self._head, strict=True)
            self.features = tuple(None if a is None or b is None else a - b for a, b in pairs)
            self._head = ()
        return output


class _BlockOutput:
    """Where a transformer block takes and returns image and text tokens, from its entry in diffusers' registry."""

    def __init__(self, metadata: Any, block: nn.Module) -> None:
        self.image, self.text = metadata.return_hidden_states_index, metadata.return_encoder_hidden_states_index
        self.image_name = getattr(metadata, "hidden_states_argument_name", "hidden_states")
        self.text_name = getattr(metadata, "encoder_hidden_states_argument_name", "encoder_hidden_states")
        self.parameters = list(inspect.signature(type(block).forward).parameters)[1:]

    def streams(self, output: Any) -> Features:
        """Returns image and text tokens of an output, None for those it lacks (SD3's last block returns no text)."""
        if not isinstance(output, tuple):
            return output, None
        return output[self.image], None if self.text is None else output[self.text]

    def packed(self, output: Any, image: Tensor | None, text: Tensor | None) -> Any:
        """Returns the tokens in the layout of `output`."""
        if not isinstance(output, tuple):
            return image
        packed = list(output)
        packed[self.image] = image
        if self.text is not None:
            packed[self.text] = text
        return tuple(packed)

    def passed_through(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns the tokens that the block was called with, in the layout of its output."""
        given = dict(zip(self.parameters, args, strict=False)) | dict(kwargs)
        image = given[self.image_name]
        return image if self.text is None else self.packed((None, None), image, given[self.text_name])


def _first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the hidden states that every UNet block takes first."""
    return args[0] if args else kwargs["hidden_states"]


def feature_cache_for(denoiser: nn.Module) -> FeatureCache:
    """Returns the feature cache of a denoiser; raises NotImplementedError, with the reason, if there is none."""
    from diffusers import UNet2DConditionModel, UNet2DModel

    if isinstance(denoiser, (UNet2DConditionModel, UNet2DModel)):
        return UnetFeatureCache(denoiser)
    return TransformerFeatureCache(denoiser)
