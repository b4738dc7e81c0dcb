"""Which positions are computed, what each reads at every kernel position, and where it is written: for the kernels.

Along one dimension, position p of `positions` reads position p · scale + first + tap · step for each of `taps`, those
inside the image alone, with the kernel's position kernel_first + tap · kernel_step, and is written to
p · place + begin.
A convolution is one such walk. Its gradient of the input is one for every phase of the stride: the positions phase,
phase + stride, … of the input are read by the same positions of the kernel, so no product is made with zeros.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.partition import Shape

DIMENSIONS = 2


class Side(NamedTuple):
    """A walk along one dimension."""

    positions: int
    scale: int
    first: int
    step: int
    taps: int
    kernel_first: int = 0
    kernel_step: int = 1
    place: int = 1
    begin: int = 0


Walk = tuple[Side, Side]


def forward_walk(convolution: Convolution, size: Shape) -> Walk:
    """Return the walk of a convolution of one or two dimensions; a missing one is of size 1."""
    sides = zip(
        convolution.output_size(size),
        convolution.kernel_shape[2:],
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        strict=True,
    )
    return _both([Side(count, s, -p, d, k) for count, k, s, p, d in sides], Side(1, 1, 0, 1, 1))


def backward_walks(convolution: Convolution, size: Shape) -> list[Walk]:
    """Return the walks of the input's gradient: between them they write every position of it."""
    sides = zip(
        size,
        convolution.kernel_shape[2:],
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        strict=True,
    )
    per_side = [[_phase(r, n, k, s, p, d) for r in range(min(s, n))] for n, k, s, p, d in sides]
    return [_both(list(walk), Side(1, 1, 0, 1, 1)) for walk in itertools.product(*per_side)]


def is_pointwise(walk: Walk) -> bool:
    """Return whether every position reads itself alone, and is written where it was read."""
    return all(side == Side(side.positions, 1, 0, side.step, 1) for side in walk)


def two_sides(shape: Shape) -> tuple[int, int]:
    """Return a size of one or two dimensions as [height, width]."""
    height, width = (1,) * (DIMENSIONS - len(shape)) + tuple(shape)
    return height, width


def _phase(phase: int, size: int, kernel: int, stride: int, padding: int, dilation: int) -> Side:
    """Return the walk over positions phase, phase + stride, … of the input, through the gradient of the output."""
    count = -((phase - size) // stride)
    reading = [tap for tap in range(kernel) if (phase + padding - tap * dilation) % stride == 0]
    if not reading:
        return Side(count, 1, 0, 1, 0, place=stride, begin=phase)
    kernel_step = reading[1] - reading[0] if len(reading) > 1 else 1
    first = (phase + padding - reading[0] * dilation) // stride
    step = -(kernel_step * dilation) // stride
    return Side(count, 1, first, step, len(reading), reading[0], kernel_step, stride, phase)


def _both(sides: list[Side], missing: Side) -> Walk:
    first, second = [missing] * (DIMENSIONS - len(sides)) + sides
    return first, second
