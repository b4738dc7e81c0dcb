"""Layers that change the shape and learn nothing."""

# ruff: noqa: RUF009 -- argument() is dataclasses.field

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from kw_lightning.errors import sentence
from kw_lightning.keras import modules
from kw_lightning.keras.arguments import Shape, Sides, argument, choice, margins, numbers, sides
from kw_lightning.keras.layer import Layer, Parts, register
from kw_lightning.keras.shapes import ShapeError, need_dimensions, written


@register
@dataclass(frozen=True)
class ZeroPadding2D(Layer):
    """Zeros around [channels, height, width]: one number, [height, width], or [[top, bottom], [left, right]]."""

    dimensions = 2

    padding: tuple[Sides, ...] = argument(margins(), 1)

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return [channels, height, width] with the zeros."""
        need_dimensions(inputs[0], 2)
        sizes = zip(inputs[0][1:], self.padding, strict=True)
        return (inputs[0][0], *(size + before + after for size, (before, after) in sizes))

    def build(self, *inputs: Shape) -> Parts:
        """Make an `nn.ZeroPad2d`."""
        (top, bottom), (left, right) = self.padding
        return Parts(nn.ZeroPad2d((left, right, top, bottom)))


@register
@dataclass(frozen=True)
class UpSampling2D(Layer):
    """Every position of [channels, height, width] several times, or bilinear between them."""

    dimensions = 2

    size: Sides = argument(sides(), 2)
    interpolation: str = argument(choice("nearest", "bilinear"), "nearest")

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return [channels, height · size, width · size]."""
        need_dimensions(inputs[0], 2)
        return (inputs[0][0], *(side * factor for side, factor in zip(inputs[0][1:], self.size, strict=True)))

    def build(self, *inputs: Shape) -> Parts:
        """Make an `nn.Upsample`."""
        factors = tuple(float(factor) for factor in self.size)
        return Parts(nn.Upsample(scale_factor=factors, mode=self.interpolation))


@register
@dataclass(frozen=True)
class Flatten(Layer):
    """All numbers of a sample in one row: channels first, where Keras's usual data come channels last."""

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return [features]."""
        return (math.prod(inputs[0]),)

    def build(self, *inputs: Shape) -> Parts:
        """Make an `nn.Flatten`."""
        return Parts(nn.Flatten())


@register
@dataclass(frozen=True)
class Reshape(Layer):
    """Another shape for the same numbers; one side may be -1, which is worked out."""

    target_shape: tuple[int, ...] = argument(numbers(-1, example="[192, 196] or [192, -1]"))

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return the target shape."""
        count, known = math.prod(inputs[0]), math.prod(side for side in self.target_shape if side != -1)
        open_sides = self.target_shape.count(-1)
        if open_sides > 1 or known < 1 or count % known or (not open_sides and known != count):
            raise ShapeError(
                f"cannot reshape {written(inputs[0])} ({count:,} numbers) to {written(self.target_shape)} "
                f"({'at most one side may be -1' if open_sides > 1 else f'{known:,} numbers'})"
            )
        return tuple(count // known if side == -1 else side for side in self.target_shape)

    def build(self, *inputs: Shape) -> Parts:
        """Make the reshaping."""
        return Parts(modules.Reshape(self.output_shape(*inputs)))


@register
@dataclass(frozen=True)
class Permute(Layer):
    """The axes of a sample in another order; they count from 1, as `dims: [2, 1]` that turns a matrix."""

    dims: tuple[int, ...] = argument(numbers(1, 8, example="[2, 1]"))

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return the sides in their new order."""
        if sorted(self.dims) != list(range(1, len(inputs[0]) + 1)):
            axes = f"each axis of {written(inputs[0])} once, from 1 to {len(inputs[0])}"
            raise ShapeError(sentence(f"the dims {written(self.dims)}", axes))
        return tuple(inputs[0][dim - 1] for dim in self.dims)

    def build(self, *inputs: Shape) -> Parts:
        """Make the permutation."""
        return Parts(modules.Permute(self.dims))
