"""Convolutions, channels first.

`padding` is "valid" or "same" as in Keras, or numbers, an addition: networks made for PyTorch pad both sides alike
where "same" with strides does not.
"""

# ruff: noqa: RUF009 -- argument() is dataclasses.field

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from kw_lightning.errors import sentence
from kw_lightning.keras.arguments import Shape, Sides, argument, flag, optional, padding, sides, whole
from kw_lightning.keras.initializers import initialize
from kw_lightning.keras.layer import Layer, Parts, register
from kw_lightning.keras.layers.activation import ACTIVATION, activation_of
from kw_lightning.keras.layers.dense import INITIALIZER, WAREHOUSE
from kw_lightning.keras.modules import SamePadding
from kw_lightning.keras.shapes import ShapeError, need_dimensions, span, window_shape, written

CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PADDING = padding("valid", "same")


@dataclass(frozen=True, kw_only=True)
class Windowed(Layer):
    """What every convolution has: a window, how it moves, and what comes after."""

    kernel_size: Sides = argument(sides())
    strides: Sides = argument(sides(), 1)
    padding: str | Sides = argument(PADDING, "valid")
    dilation_rate: Sides = argument(sides(), 1)
    activation: str | None = argument(optional(ACTIVATION), None)
    use_bias: bool = argument(flag(), True)
    bias_initializer: str = argument(INITIALIZER, "zeros")

    def window(self, shape: Shape, channels: int) -> Shape:
        """Return [channels, *size] of the output."""
        need_dimensions(shape, self.dimensions)
        return window_shape(shape, self.kernel_size, self.strides, self.dilation_rate, self.padding, channels=channels)

    def convolution(self, in_channels: int, out_channels: int, groups: int) -> tuple[nn.Module | None, Any]:
        """Return the padding, if one is needed, and the convolution."""
        before, pads = self._padding()
        module = CONVOLUTIONS[self.dimensions - 1](
            in_channels,
            out_channels,
            self.kernel_size,
            self.strides,
            pads,
            self.dilation_rate,
            groups,
            self.use_bias,
        )
        return before, module

    def _padding(self) -> tuple[nn.Module | None, Sides]:
        """Return a padding module and what the convolution pads itself, which is alike on both sides."""
        none = (0,) * self.dimensions
        if self.padding == "valid":
            return None, none
        if not isinstance(self.padding, str):
            return None, self.padding
        reach = [span(k, d) - 1 for k, d in zip(self.kernel_size, self.dilation_rate, strict=True)]
        if self.padding == "causal":
            return nn.ConstantPad1d((reach[0], 0), 0.0), none
        if all(stride == 1 for stride in self.strides) and all(total % 2 == 0 for total in reach):
            return None, tuple(total // 2 for total in reach)
        return SamePadding(self.kernel_size, self.strides, self.dilation_rate), none


@dataclass(frozen=True, kw_only=True)
class Conv(Windowed):
    """A convolution; starts from glorot uniform with biases 0, where PyTorch draws both from Kaiming uniform."""

    dynamic: ClassVar[Mapping[str, str]] = {"warehouse": ""}

    filters: int = argument(whole())
    groups: int = argument(whole(), 1)
    kernel_initializer: str = argument(INITIALIZER, "glorot_uniform")
    warehouse: str | None = argument(WAREHOUSE, None)

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return [filters, *size]."""
        need_dimensions(inputs[0], self.dimensions)
        channels = inputs[0][0]
        if channels % self.groups or self.filters % self.groups:
            found = (
                f"{self.groups} groups, {channels} channels of the input {written(inputs[0])}, {self.filters} filters"
            )
            raise ShapeError(sentence(found, "a number of groups that divides channels and filters"))
        return self.window(inputs[0], self.filters)

    def build(self, *inputs: Shape) -> Parts:
        """Make an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`."""
        before, module = self.convolution(inputs[0][0], self.filters, self.groups)
        initialize(module.weight, self.kernel_initializer)
        initialize(module.bias, self.bias_initializer)
        return Parts(module, before, activation_of(self.activation, self.output_shape(*inputs)))


@register
@dataclass(frozen=True, kw_only=True)
class Conv1D(Conv):
    """A convolution over [channels, length]; "causal" pads only before."""

    dimensions = 1

    padding: str | Sides = argument(padding("valid", "same", "causal"), "valid")


@register
class Conv2D(Conv):
    """A convolution over [channels, height, width]."""

    dimensions = 2


@register
class Conv3D(Conv):
    """A convolution over [channels, depth, height, width]."""

    dimensions = 3


@register
@dataclass(frozen=True, kw_only=True)
class DepthwiseConv2D(Windowed):
    """A convolution of every channel by itself: `depth_multiplier` outputs for each."""

    dimensions = 2
    dynamic: ClassVar[Mapping[str, str]] = {"warehouse": ""}

    depth_multiplier: int = argument(whole(), 1)
    depthwise_initializer: str = argument(INITIALIZER, "glorot_uniform")
    warehouse: str | None = argument(WAREHOUSE, None)

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return [channels · depth_multiplier, height, width]."""
        need_dimensions(inputs[0], self.dimensions)
        return self.window(inputs[0], inputs[0][0] * self.depth_multiplier)

    def build(self, *inputs: Shape) -> Parts:
        """Make an `nn.Conv2d` with a group a channel."""
        channels = inputs[0][0]
        before, module = self.convolution(channels, channels * self.depth_multiplier, channels)
        self._initialize(module, channels)
        initialize(module.bias, self.bias_initializer)
        return Parts(module, before, activation_of(self.activation, self.output_shape(*inputs)))

    def _initialize(self, module: Any, channels: int) -> None:
        # Keras counts the fan in of its kernel [*size, channels, multiplier] over all channels.
        field = math.prod(self.kernel_size)
        initialize(
            module.weight, self.depthwise_initializer, fan_in=channels * field, fan_out=self.depth_multiplier * field
        )


@register
@dataclass(frozen=True, kw_only=True)
class SeparableConv2D(DepthwiseConv2D):
    """A depthwise convolution and a 1×1 convolution after it.

    `warehouse` makes the 1×1 convolution dynamic, `depthwise_warehouse` the depthwise one: the two differ in shape and
    so seldom share cells.
    """

    dynamic: ClassVar[Mapping[str, str]] = {"warehouse": "pointwise", "depthwise_warehouse": "depthwise"}

    filters: int = argument(whole())
    pointwise_initializer: str = argument(INITIALIZER, "glorot_uniform")
    depthwise_warehouse: str | None = argument(WAREHOUSE, None)

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return [filters, height, width]."""
        return (self.filters, *super().output_shape(*inputs)[1:])

    def build(self, *inputs: Shape) -> Parts:
        """Make both convolutions, `depthwise` and `pointwise`; the bias is the second one's."""
        channels = inputs[0][0]
        inner = channels * self.depth_multiplier
        before, depthwise = replace(self, use_bias=False).convolution(channels, inner, channels)
        self._initialize(depthwise, channels)
        pointwise = nn.Conv2d(inner, self.filters, 1, bias=self.use_bias)
        initialize(pointwise.weight, self.pointwise_initializer)
        initialize(pointwise.bias, self.bias_initializer)
        both = nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise))
        return Parts(both, before, activation_of(self.activation, self.output_shape(*inputs)))
