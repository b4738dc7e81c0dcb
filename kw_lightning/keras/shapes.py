"""The arithmetic of shapes: windows, Keras's "same" padding, axes, broadcasting. Pure; shapes are without the batch."""

from __future__ import annotations

from collections.abc import Sequence

from kw_lightning.errors import sentence
from kw_lightning.keras.arguments import Shape, Sides


class ShapeError(ValueError):
    """A layer that cannot take its input; the message has the shapes."""


def written(shape: Sequence[int]) -> str:
    """Return a shape for messages: `[64, 8, 8]`."""
    return f"[{', '.join(map(str, shape))}]"


def span(kernel: int, dilation: int) -> int:
    """Return how many positions a dilated kernel covers."""
    return dilation * (kernel - 1) + 1


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Return the zeros (before, after) that make an output of ceil(size / stride), TensorFlow's rule.

    An odd one goes behind, so that a stride-2 kernel of 3 on an even size pads 0 before and 1 after, where PyTorch's
    `padding=1` pads both sides.
    """
    # Not -(-size // stride): in an exported graph the division of a negative number rounds towards 0.
    total = max(((size + stride - 1) // stride - 1) * stride + span(kernel, dilation) - size, 0)
    return total // 2, total - total // 2


def window_shape(
    shape: Shape, kernel: Sides, strides: Sides, dilation: Sides, padding: str | Sides, *, channels: int
) -> Shape:
    """Return [channels, *size] of a window that moves over [channels, *size].

    Args:
        padding: "same", "valid", "causal" or the zeros on both sides of each dimension.

    Raises:
        ShapeError: the window is larger than what it moves over.
    """
    sizes = []
    for index, size in enumerate(shape[1:]):
        if padding == "same":
            sizes.append(-(-size // strides[index]))
            continue
        reach = span(kernel[index], dilation[index])
        if padding == "causal":
            room = size + reach - 1
        else:
            room = size + (0 if isinstance(padding, str) else 2 * padding[index])
        if room < reach:
            left = (room - reach) // strides[index] + 1
            raise ShapeError(
                f"a window of {reach} does not fit in {room} positions of the input {written(shape)} "
                f"(the size would be {left}); use padding: same, a smaller window or less pooling before"
            )
        sizes.append((room - reach) // strides[index] + 1)
    return (channels, *sizes)


def need_dimensions(shape: Shape, dimensions: int) -> None:
    """Raise ShapeError unless the shape is [channels, *size] of that many dimensions."""
    if len(shape) != dimensions + 1:
        sides = ("length", "height, width", "depth, height, width")[dimensions - 1]
        raise ShapeError(sentence(f"an input {written(shape)}", f"[channels, {sides}]"))


def feature_axis(shape: Shape) -> int:
    """Return the axis (batch = 0) of channels or features: of [channels, height, width] 1, of tokens the last.

    Keras's default -1 means the channels of channels-last data; this is the same axis of channels-first data.
    """
    return 1 if len(shape) > 2 else len(shape)


def resolve_axis(axis: int | None, shape: Shape) -> int:
    """Return an axis as a positive number (batch = 0); None means `feature_axis`.

    Raises:
        ShapeError: the shape has no such axis.
    """
    if axis is None:
        return feature_axis(shape)
    resolved = axis if axis > 0 else len(shape) + 1 + axis
    if not 1 <= resolved <= len(shape):
        raise ShapeError(
            sentence(f"the axis {axis} of {written(shape)}", f"1 to {len(shape)}; the batch is not counted")
        )
    return resolved


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """Return the common shape of inputs that are combined elementwise, where 1 fits any size, as in Keras.

    Raises:
        ShapeError: they differ.
    """
    if len({len(shape) for shape in shapes}) > 1 or any(
        len({size for size in sizes if size != 1}) > 1 for sizes in zip(*shapes, strict=True)
    ):
        raise ShapeError(f"the inputs have different shapes: {' and '.join(map(written, shapes))}")
    return tuple(max(sizes) for sizes in zip(*shapes, strict=True))
