"""The dense layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from kw_lightning.keras.arguments import Shape, argument, choice, flag, optional, text, whole
from kw_lightning.keras.initializers import INITIALIZERS, initialize
from kw_lightning.keras.layer import Layer, Parts, register
from kw_lightning.keras.layers.activation import ACTIVATION, activation_of

INITIALIZER = choice(*INITIALIZERS)
WAREHOUSE = optional(text())


@register
@dataclass(frozen=True)
class Dense(Layer):
    """A linear layer on the last axis: [features] or [tokens, features], as in Keras.

    Of [channels, height, width] the last axis is the width: put GlobalAveragePooling2D, Flatten or Permute before it,
    or take Conv2D with `kernel_size: 1`. Starts from glorot uniform with biases 0; PyTorch from Kaiming uniform.
    """

    dynamic: ClassVar[Mapping[str, str]] = {"warehouse": ""}

    units: int = argument(whole())
    activation: str | None = argument(optional(ACTIVATION), None)
    use_bias: bool = argument(flag(), True)
    kernel_initializer: str = argument(INITIALIZER, "glorot_uniform")
    bias_initializer: str = argument(INITIALIZER, "zeros")
    warehouse: str | None = argument(WAREHOUSE, None)

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return [*, units]."""
        return (*inputs[0][:-1], self.units)

    def build(self, *inputs: Shape) -> Parts:
        """Make an `nn.Linear`."""
        linear = nn.Linear(inputs[0][-1], self.units, self.use_bias)
        initialize(linear.weight, self.kernel_initializer)
        initialize(linear.bias, self.bias_initializer)
        return Parts(linear, after=activation_of(self.activation, self.output_shape(*inputs)))
