"""Pooling, channels first, in one, two and three dimensions."""

# ruff: noqa: RUF009 -- argument() is dataclasses.field

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from kw_lightning.errors import sentence
from kw_lightning.keras.arguments import Shape, Sides, argument, flag, optional, padding, sides
from kw_lightning.keras.layer import Layer, Parts, register
from kw_lightning.keras.modules import GlobalPool, SameAveragePool, SamePadding
from kw_lightning.keras.shapes import ShapeError, need_dimensions, window_shape, written

MAX_POOLS: tuple[Any, ...] = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AVERAGE_POOLS: tuple[Any, ...] = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


@dataclass(frozen=True, kw_only=True)
class Pooling(Layer):
    """A window that moves by its own size unless `strides` says otherwise; what is padded counts for nothing."""

    pool_size: Sides = argument(sides(), 2)
    strides: Sides | None = argument(optional(sides()), None)
    padding: str | Sides = argument(padding("valid", "same"), "valid")

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return [channels, *size]."""
        need_dimensions(inputs[0], self.dimensions)
        if not isinstance(self.padding, str) and any(
            2 * pad > size for pad, size in zip(self.padding, self.pool_size, strict=True)
        ):
            found = f"the padding {written(self.padding)}"
            raise ShapeError(sentence(found, f"at most half of pool_size {written(self.pool_size)}"))
        ones = (1,) * self.dimensions
        return window_shape(inputs[0], self.pool_size, self.steps, ones, self.padding, channels=inputs[0][0])

    @property
    def steps(self) -> Sides:
        """Return how far the window moves."""
        return self.pool_size if self.strides is None else self.strides

    @property
    def pads(self) -> Sides:
        """Return the padding given as numbers."""
        return (0,) * self.dimensions if isinstance(self.padding, str) else self.padding


class MaxPooling(Pooling):
    """The maximum in every window."""

    def build(self, *inputs: Shape) -> Parts:
        """Make an `nn.MaxPool`."""
        module = MAX_POOLS[self.dimensions - 1](self.pool_size, self.steps, self.pads)
        if self.padding != "same":
            return Parts(module)
        ones = (1,) * self.dimensions
        return Parts(module, SamePadding(self.pool_size, self.steps, ones, -math.inf))


@dataclass(frozen=True, kw_only=True)
class AveragePooling(Pooling):
    """The mean of every window."""

    pool_size: Sides = argument(sides())  # Keras has a default for the maximum only

    def build(self, *inputs: Shape) -> Parts:
        """Make an `nn.AvgPool`."""
        if self.padding == "same":
            return Parts(SameAveragePool(self.pool_size, self.steps))
        pool = AVERAGE_POOLS[self.dimensions - 1]
        return Parts(pool(self.pool_size, self.steps, self.pads, count_include_pad=False))


@dataclass(frozen=True, kw_only=True)
class GlobalPooling(Layer):
    """One number a channel, over all positions."""

    kind: ClassVar[str]

    keepdims: bool = argument(flag(), False)

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return [channels], with `keepdims` [channels, 1 …]."""
        need_dimensions(inputs[0], self.dimensions)
        return (inputs[0][0], *([1] * self.dimensions if self.keepdims else []))

    def build(self, *inputs: Shape) -> Parts:
        """Make the pooling."""
        return Parts(GlobalPool(self.kind, self.keepdims))


class GlobalAveragePooling(GlobalPooling):
    """The mean of each channel."""

    kind = "average"


class GlobalMaxPooling(GlobalPooling):
    """The maximum of each channel."""

    kind = "max"


@register
class MaxPooling1D(MaxPooling):
    """The maximum in every window of [channels, length]."""

    dimensions = 1


@register
class MaxPooling2D(MaxPooling):
    """The maximum in every window of [channels, height, width]."""

    dimensions = 2


@register
class MaxPooling3D(MaxPooling):
    """The maximum in every window of [channels, depth, height, width]."""

    dimensions = 3


@register
class AveragePooling1D(AveragePooling):
    """The mean of every window of [channels, length]."""

    dimensions = 1


@register
class AveragePooling2D(AveragePooling):
    """The mean of every window of [channels, height, width]."""

    dimensions = 2


@register
class AveragePooling3D(AveragePooling):
    """The mean of every window of [channels, depth, height, width]."""

    dimensions = 3


@register
class GlobalAveragePooling1D(GlobalAveragePooling):
    """The mean of each channel of [channels, length]."""

    dimensions = 1


@register
class GlobalAveragePooling2D(GlobalAveragePooling):
    """The mean of each channel of [channels, height, width]."""

    dimensions = 2


@register
class GlobalAveragePooling3D(GlobalAveragePooling):
    """The mean of each channel of [channels, depth, height, width]."""

    dimensions = 3


@register
class GlobalMaxPooling1D(GlobalMaxPooling):
    """The maximum of each channel of [channels, length]."""

    dimensions = 1


@register
class GlobalMaxPooling2D(GlobalMaxPooling):
    """The maximum of each channel of [channels, height, width]."""

    dimensions = 2


@register
class GlobalMaxPooling3D(GlobalMaxPooling):
    """The maximum of each channel of [channels, depth, height, width]."""

    dimensions = 3
