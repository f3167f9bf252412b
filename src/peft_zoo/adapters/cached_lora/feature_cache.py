"""Reuse of deep features inside a denoiser: a pass that stores them, and a short one that takes them from a store.

UNet: the input of the last up block is kept. The short pass is `conv_in`, the first down block without its downsampler,
the last up block and `conv_out`; whatever lies between does not run (DeepCache, Ma et al., CVPR 2024).

Transformer: what all blocks after the first add to its output is kept. The short pass runs the first block and adds it
(as diffusers' FirstBlockCache, where a threshold decides; here the schedule does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

Features = tuple[Tensor | None, ...]
Patch = tuple[nn.Module, Callable[..., Any]]


class Blocks:
    """The part of a denoiser that a short pass leaves out.

    Attributes:
        mode: `store` keeps the features of a pass in `features`, `replay` takes them from there; `off` does neither.
        features: Tensors whose first dimension is the batch.
    """

    def __init__(self) -> None:
        self.mode: Literal["off", "store", "replay"] = "off"
        self.features: Features | None = None

    def patches(self) -> Iterator[Patch]:
        """Modules, and what shall run in place of their forward, which is its first argument."""
        raise NotImplementedError


class UnetBlocks(Blocks):
    """The deep part of a `UNet2DConditionModel` or `UNet2DModel`.

    Args:
        unet: The model.

    Raises:
        NotImplementedError: If its blocks are not connected in the usual way.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.down, self.up, self.mid = list(unet.down_blocks), list(unet.up_blocks), unet.mid_block
        usual = all(hasattr(block, "resnets") and not hasattr(block, "skip_conv") for block in self.down)
        if len(self.down) < 2 or not usual or not self.down[0].downsamplers:
            raise NotImplementedError("its blocks are not the usual ones, of which there must be two or more")

    def patches(self) -> Iterator[Patch]:
        """See `Blocks`."""
        yield self.down[0].downsamplers[0], self._skip
        yield from ((block, partial(self._skip_down, block)) for block in self.down[1:])
        if self.mid is not None:
            yield self.mid, self._skip
        yield from ((block, self._skip) for block in self.up[:-1])
        yield self.up[-1], self._last_up

    def _skip(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _hidden(args, kwargs) if self.mode == "replay" else forward(*args, **kwargs)

    def _skip_down(self, block: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.mode != "replay":
            return forward(*args, **kwargs)
        hidden = _hidden(args, kwargs)
        skips = len(block.resnets) + len(block.downsamplers or ())  # nobody looks at them, but they are counted
        return hidden, (hidden,) * skips

    def _last_up(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.mode == "store":
            self.features = (_hidden(args, kwargs),)
        elif self.mode == "replay" and self.features:
            if args:
                args = (self.features[0], *args[1:])
            else:
                kwargs["hidden_states"] = self.features[0]
        return forward(*args, **kwargs)


class TransformerBlocks(Blocks):
    """All blocks but the first of a diffusion transformer whose blocks diffusers knows.

    Args:
        transformer: The model.

    Raises:
        NotImplementedError: If it has fewer than two blocks, or of an unknown kind.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        try:  # private, and there since diffusers 0.35
            from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
            from diffusers.hooks._helpers import TransformerBlockRegistry
        except ImportError as error:
            raise NotImplementedError("this version of diffusers does not say what its blocks return") from error
        lists = (part for name, part in transformer.named_children() if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS)
        blocks = [block for part in lists if isinstance(part, nn.ModuleList) for block in part]
        if len(blocks) < 2:
            raise NotImplementedError("it has fewer than two transformer blocks in a list")
        try:
            self.blocks = [(block, TransformerBlockRegistry.get(type(block))) for block in blocks]
        except ValueError as error:
            raise NotImplementedError("diffusers does not know what its blocks return") from error
        self._head: Features = ()

    def patches(self) -> Iterator[Patch]:
        """See `Blocks`."""
        for place, (block, signature) in enumerate(self.blocks):
            run = self._first if place == 0 else self._last if place == len(self.blocks) - 1 else self._skip
            yield block, partial(run, signature)

    def _first(self, signature: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if self.mode == "store":
            self._head = _streams(signature, output)
        if self.mode != "replay" or not self.features:
            return output
        moved = (
            a if a is None or b is None else a + b
            for a, b in zip(_streams(signature, output), self.features, strict=True)
        )
        return _packed(signature, output, *moved)

    def _skip(self, signature: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.mode != "replay":
            return forward(*args, **kwargs)
        hidden = signature._get_parameter_from_args_kwargs("hidden_states", args, kwargs)
        if signature.return_encoder_hidden_states_index is None:
            return hidden
        other = signature._get_parameter_from_args_kwargs("encoder_hidden_states", args, kwargs)
        return _packed(signature, (None, None), hidden, other)

    def _last(self, signature: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = self._skip(signature, forward, *args, **kwargs)
        if self.mode == "store":
            pairs = zip(_streams(signature, output), self._head, strict=True)
            self.features = tuple(None if a is None or b is None else a - b for a, b in pairs)
            self._head = ()
        return output


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of every UNet block."""
    return args[0] if args else kwargs["hidden_states"]


def _streams(signature: Any, output: Any) -> Features:
    """Image tokens and, where a block returns them, text tokens (the last block of SD3 returns None for them)."""
    if not isinstance(output, tuple):
        return output, None
    other = signature.return_encoder_hidden_states_index
    return output[signature.return_hidden_states_index], None if other is None else output[other]


def _packed(signature: Any, output: Any, hidden: Tensor | None, other: Tensor | None) -> Any:
    """The tokens in the form in which a block returned them."""
    if not isinstance(output, tuple):
        return hidden
    packed = list(output)
    packed[signature.return_hidden_states_index] = hidden
    if signature.return_encoder_hidden_states_index is not None:
        packed[signature.return_encoder_hidden_states_index] = other
    return tuple(packed)


def find_blocks(denoiser: nn.Module) -> Blocks:
    """The part of a denoiser that a short pass leaves out.

    Raises:
        NotImplementedError: If there is no known one, saying why.
    """
    from diffusers import UNet2DConditionModel, UNet2DModel

    if isinstance(denoiser, (UNet2DConditionModel, UNet2DModel)):
        return UnetBlocks(denoiser)
    return TransformerBlocks(denoiser)


__all__: list[str] = []
