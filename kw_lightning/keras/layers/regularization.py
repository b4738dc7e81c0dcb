"""Layers that only do something in training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torchvision.ops import StochasticDepth as DropBranch

from kw_lightning.keras.arguments import Shape, argument, number
from kw_lightning.keras.layer import Parts, register
from kw_lightning.keras.layers.activation import Elementwise
from kw_lightning.keras.shapes import need_dimensions


@dataclass(frozen=True)
class Random(Elementwise):
    """A layer that leaves a share of something out."""

    rate: float = argument(number(0, below=1))


@register
class Dropout(Random):
    """Leave single numbers out; the rest grows by 1 / (1 - rate)."""

    def build(self, *inputs: Shape) -> Parts:
        """Make an `nn.Dropout`."""
        return Parts(nn.Dropout(self.rate))


@register
class SpatialDropout2D(Random):
    """Leave whole channels of [channels, height, width] out."""

    dimensions = 2

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return the input's shape."""
        need_dimensions(inputs[0], 2)
        return inputs[0]

    def build(self, *inputs: Shape) -> Parts:
        """Make an `nn.Dropout2d`."""
        return Parts(nn.Dropout2d(self.rate))


@register
class StochasticDepth(Random):
    """Leave the branch out for whole samples; stands before the Add that ends a residual block (Huang et al. 2016)."""

    def build(self, *inputs: Shape) -> Parts:
        """Make torchvision's module."""
        return Parts(DropBranch(self.rate, "row"))
