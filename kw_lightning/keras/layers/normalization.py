"""Normalization layers.

Keras's epsilon is 1e-3, PyTorch's 1e-5. Keras's momentum is the share kept, PyTorch's the share taken in: Keras's
default 0.99 is PyTorch's 0.01.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from kw_lightning.errors import sentence
from kw_lightning.keras.arguments import Shape, argument, axis, flag, number, optional, whole
from kw_lightning.keras.layer import Parts, register
from kw_lightning.keras.layers.activation import Elementwise
from kw_lightning.keras.modules import AxisLayerNorm
from kw_lightning.keras.shapes import ShapeError, resolve_axis, written

BATCH_NORMS: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def keep_affine(module: Any, *, center: bool, scale: bool) -> nn.Module:
    """Take the weight or the bias away where Keras has none; torch's norms run with either alone."""
    if not scale:
        module.register_parameter("weight", None)
    if not center:
        module.register_parameter("bias", None)
    return module  # type: ignore[no-any-return]


@register
@dataclass(frozen=True, kw_only=True)
class BatchNormalization(Elementwise):
    """Normalize each channel over batch and positions: axis 1 of channels-first data.

    In training PyTorch's running variance takes in the unbiased variance of a batch, Keras's the biased one.
    """

    momentum: float = argument(number(0, 1), 0.99)
    epsilon: float = argument(number(0), 1e-3)
    center: bool = argument(flag(), True)
    scale: bool = argument(flag(), True)

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return the input's shape."""
        if len(inputs[0]) > 4:
            allowed = "[features] or [channels, *size] with up to 3 sides"
            raise ShapeError(sentence(f"an input {written(inputs[0])}", allowed))
        return inputs[0]

    def build(self, *inputs: Shape) -> Parts:
        """Make an `nn.BatchNorm1d`, `nn.BatchNorm2d` or `nn.BatchNorm3d`."""
        norm = BATCH_NORMS[len(inputs[0]) - 1]
        # Rounded, so that 0.9 gives 0.1 and not 0.09999999999999998.
        momentum = round(1 - self.momentum, 12)
        module = norm(inputs[0][0], self.epsilon, momentum, affine=self.center or self.scale)
        return Parts(keep_affine(module, center=self.center, scale=self.scale))


@register
@dataclass(frozen=True, kw_only=True)
class LayerNormalization(Elementwise):
    """Normalize over the features of each token, or over the channels of each position.

    Without `axis`: the channels of [channels, height, width], else the last axis; both are Keras's default -1 on
    channels-last data.
    """

    axis: int | None = argument(optional(axis()), None)
    epsilon: float = argument(number(0), 1e-3)
    center: bool = argument(flag(), True)
    scale: bool = argument(flag(), True)

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return the input's shape."""
        resolve_axis(self.axis, inputs[0])
        return inputs[0]

    def build(self, *inputs: Shape) -> Parts:
        """Make an `nn.LayerNorm`, or one over another axis than the last."""
        axis = resolve_axis(self.axis, inputs[0])
        size, affine = inputs[0][axis - 1], self.center or self.scale
        if axis == len(inputs[0]):
            module: nn.Module = nn.LayerNorm(size, self.epsilon, affine)
        else:
            module = AxisLayerNorm(size, axis, self.epsilon, affine)
        return Parts(keep_affine(module, center=self.center, scale=self.scale))


@register
@dataclass(frozen=True, kw_only=True)
class GroupNormalization(Elementwise):
    """Normalize over groups of channels and all positions; `groups: -1` makes each channel its own group."""

    groups: int = argument(whole(-1), 32)
    epsilon: float = argument(number(0), 1e-3)
    center: bool = argument(flag(), True)
    scale: bool = argument(flag(), True)

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return the input's shape."""
        channels = inputs[0][0]
        if self.groups == 0 or channels % self._count(channels):
            found = f"{self.groups} groups of an input {written(inputs[0])}"
            raise ShapeError(sentence(found, "a number that divides the channels"))
        return inputs[0]

    def build(self, *inputs: Shape) -> Parts:
        """Make an `nn.GroupNorm`."""
        channels = inputs[0][0]
        module = nn.GroupNorm(self._count(channels), channels, self.epsilon, self.center or self.scale)
        return Parts(keep_affine(module, center=self.center, scale=self.scale))

    def _count(self, channels: int) -> int:
        return channels if self.groups == -1 else self.groups
