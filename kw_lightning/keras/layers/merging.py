"""Layers with several inputs. A side of 1 fits any size, as in Keras: `Multiply` of [64, 1, 1] and [64, 8, 8]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kw_lightning.keras import modules
from kw_lightning.keras.arguments import Shape, argument, axis, optional
from kw_lightning.keras.layer import Layer, Parts, register
from kw_lightning.keras.shapes import ShapeError, broadcast, resolve_axis, written


class Merge(Layer):
    """Several inputs, elementwise."""

    least_inputs = 2
    most_inputs: ClassVar[int | None] = None
    operation: ClassVar[str]

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return the common shape."""
        return broadcast(inputs)

    def build(self, *inputs: Shape) -> Parts:
        """Make the operation."""
        return Parts(modules.Merge(self.operation))


@register
class Add(Merge):
    """The sum of the inputs."""

    operation = "add"


@register
class Subtract(Merge):
    """The first input minus the second."""

    operation = "subtract"
    most_inputs = 2


@register
class Multiply(Merge):
    """The product of the inputs."""

    operation = "multiply"


@register
class Average(Merge):
    """The mean of the inputs."""

    operation = "average"


@register
class Maximum(Merge):
    """The largest of the inputs, elementwise."""

    operation = "maximum"


@register
@dataclass(frozen=True)
class Concatenate(Layer):
    """The inputs one after the other along the channels (or features); `axis` chooses another axis."""

    least_inputs = 2
    most_inputs = None

    axis: int | None = argument(optional(axis()), None)

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return the shape with the sizes along the axis added up."""
        axis = resolve_axis(self.axis, inputs[0])
        rest = {(*shape[: axis - 1], 0, *shape[axis:]) for shape in inputs}
        if len(rest) > 1 or len({len(shape) for shape in inputs}) > 1:
            shapes = " and ".join(map(written, inputs))
            raise ShapeError(f"the inputs differ in more than axis {axis}, along which they are joined: {shapes}")
        first = inputs[0]
        return (*first[: axis - 1], sum(shape[axis - 1] for shape in inputs), *first[axis:])

    def build(self, *inputs: Shape) -> Parts:
        """Make the operation."""
        return Parts(modules.Concatenate(resolve_axis(self.axis, inputs[0])))
