"""Activations: by name as an argument of other layers, and as layers of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from kw_lightning.keras import modules
from kw_lightning.keras.arguments import Shape, argument, axis, choice, flag, number, numbers, optional
from kw_lightning.keras.layer import Layer, Parts, register
from kw_lightning.keras.shapes import resolve_axis

# Of the input's shape, since Keras's softmax runs over channels or features.
ACTIVATIONS: dict[str, Callable[[Shape], nn.Module]] = {
    "linear": lambda shape: nn.Identity(),
    "relu": lambda shape: nn.ReLU(),
    "relu6": lambda shape: nn.ReLU6(),
    "leaky_relu": lambda shape: nn.LeakyReLU(0.2),
    "elu": lambda shape: nn.ELU(),
    "selu": lambda shape: nn.SELU(),
    "gelu": lambda shape: nn.GELU(),
    "silu": lambda shape: nn.SiLU(),
    "swish": lambda shape: nn.SiLU(),
    "mish": lambda shape: nn.Mish(),
    "hard_sigmoid": lambda shape: nn.Hardsigmoid(),
    "hard_silu": lambda shape: nn.Hardswish(),
    "hard_swish": lambda shape: nn.Hardswish(),
    "sigmoid": lambda shape: nn.Sigmoid(),
    "log_sigmoid": lambda shape: nn.LogSigmoid(),
    "tanh": lambda shape: nn.Tanh(),
    "softplus": lambda shape: nn.Softplus(),
    "softsign": lambda shape: nn.Softsign(),
    "exponential": lambda shape: modules.FunctionModule("exp"),
    "softmax": lambda shape: nn.Softmax(resolve_axis(None, shape)),
    "log_softmax": lambda shape: nn.LogSoftmax(resolve_axis(None, shape)),
}
"""Keras's activations by name: a function of the shape [channels, …] that they work on."""

ACTIVATION = choice(*ACTIVATIONS)


def activation_of(name: str | None, shape: Shape) -> nn.Module | None:
    """Return the activation given as another layer's argument; nothing for none and "linear"."""
    return None if name in (None, "linear") else ACTIVATIONS[str(name)](shape)


@dataclass(frozen=True)
class Elementwise(Layer):
    """A layer that keeps the shape."""

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return the input's shape."""
        return inputs[0]


@register
@dataclass(frozen=True)
class Activation(Elementwise):
    """An activation by its name."""

    activation: str = argument(ACTIVATION)

    def build(self, *inputs: Shape) -> Parts:
        """Make the activation."""
        return Parts(ACTIVATIONS[self.activation](inputs[0]))


@register
@dataclass(frozen=True)
class ReLU(Elementwise):
    """max(x, 0), with an optional upper bound, slope below and threshold; `max_value: 6` is ReLU6."""

    max_value: float | None = argument(optional(number(0)), None)
    negative_slope: float = argument(number(0), 0.0)
    threshold: float = argument(number(0), 0.0)

    def build(self, *inputs: Shape) -> Parts:
        """Make the activation."""
        if self.threshold or (self.negative_slope and self.max_value is not None):
            return Parts(modules.ClippedReLU(self.max_value, self.negative_slope, self.threshold))
        if self.negative_slope:
            return Parts(nn.LeakyReLU(self.negative_slope))
        if self.max_value is None:
            return Parts(nn.ReLU())
        return Parts(nn.ReLU6() if self.max_value == 6 else modules.ClippedReLU(self.max_value, 0.0, 0.0))


@register
@dataclass(frozen=True)
class LeakyReLU(Elementwise):
    """x above 0, `negative_slope`·x below; Keras's slope is 0.3, PyTorch's 0.01."""

    negative_slope: float = argument(number(0), 0.3)

    def build(self, *inputs: Shape) -> Parts:
        """Make the activation."""
        return Parts(nn.LeakyReLU(self.negative_slope))


@register
@dataclass(frozen=True)
class PReLU(Elementwise):
    """x above 0, alpha·x below with learnt alphas: one for each element, from 0; PyTorch has one a channel, from 0.25.

    `shared_axes: [2, 3]` of [channels, height, width] shares them over all positions.
    """

    shared_axes: tuple[int, ...] | None = argument(optional(numbers(1, 8, example="[2, 3]")), None)

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return the input's shape."""
        for shared in self.shared_axes or ():
            resolve_axis(shared, inputs[0])
        return inputs[0]

    def build(self, *inputs: Shape) -> Parts:
        """Make the activation."""
        shared = self.shared_axes or ()
        return Parts(modules.PReLU([1 if index + 1 in shared else size for index, size in enumerate(inputs[0])]))


@register
@dataclass(frozen=True)
class GELU(Elementwise):
    """Gaussian error linear unit; in Keras `Activation: {activation: gelu}`."""

    approximate: bool = argument(flag(), False)

    def build(self, *inputs: Shape) -> Parts:
        """Make the activation."""
        return Parts(nn.GELU("tanh" if self.approximate else "none"))


@register
@dataclass(frozen=True)
class SiLU(Elementwise):
    """x · sigmoid(x), also called swish; in Keras `Activation: {activation: silu}`."""

    def build(self, *inputs: Shape) -> Parts:
        """Make the activation."""
        return Parts(nn.SiLU())


@register
@dataclass(frozen=True)
class Softmax(Elementwise):
    """Softmax over channels or features; `axis` chooses another axis."""

    axis: int | None = argument(optional(axis()), None)

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return the input's shape."""
        resolve_axis(self.axis, inputs[0])
        return inputs[0]

    def build(self, *inputs: Shape) -> Parts:
        """Make the activation."""
        return Parts(nn.Softmax(resolve_axis(self.axis, inputs[0])))
