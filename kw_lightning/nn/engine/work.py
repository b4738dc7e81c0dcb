"""Multiply-adds of a dynamic convolution: one arithmetic for the plan, for FLOP counters and for benchmarks.

Three orders of contraction give the same output; for one sample, with m mixtures of n cells:

- `mix_kernels`: the kernel is mixed out of the cells (m·n·|cell|), and the input convolved with it;
- `mix_outputs`: the input is convolved with all cells, and at every position of it the results are mixed;
- `mix_inputs`: at every position of the output what the mixtures read is mixed for each cell, then convolved with it.

Counted as torch counts its own convolutions: positions in the padding are, biases are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.planner import refusal

ORDERS = ("mix_kernels", "mix_outputs", "mix_inputs")


class MultiplyAdds(NamedTuple):
    """What one order takes for a sample: the linear mixture, and the convolution or products beside it."""

    mixing: int
    products: int


def count(order: str, convolution: Convolution, cells: int, inputs: int, outputs: int) -> MultiplyAdds:
    """Return the multiply-adds of a forward pass for one sample.

    Args:
        order: one of `ORDERS`.
        convolution: the geometry; stride, padding and dilation say nothing here.
        cells: n.
        inputs, outputs: positions, or tokens, of the input and of the output.
    """
    spatial, out_groups, in_groups = convolution.grid
    cell = math.prod(convolution.cell_shape)
    co = convolution.cell_shape[0]
    mixtures = math.prod(spatial) * out_groups * in_groups
    if order == "mix_kernels":
        return MultiplyAdds(mixtures * cells * cell, math.prod(convolution.kernel_shape) * outputs)
    if math.prod(convolution.cell_shape[2:]) > 1:  # the patch that a whole cell reads is one wide pixel
        inputs = outputs
    if order == "mix_outputs":
        return MultiplyAdds(mixtures * cells * co * inputs, cells * cell * in_groups * inputs)
    return MultiplyAdds(mixtures * cells * cell // co * outputs, cells * cell * out_groups * outputs)


def forward(engine: str, convolution: Convolution, cells: int, inputs: int, outputs: int) -> int:
    """Return the multiply-adds of a forward pass for one sample, in the cheapest order that an engine may take.

    Args:
        engine: one of `ENGINES`; "reference" is the literal form, which mixes kernels.
        convolution, cells, inputs, outputs: as of `count`.
    """
    return min(sum(count(order, convolution, cells, inputs, outputs)) for order in _orders(engine, convolution))


def backward(
    engine: str, convolution: Convolution, cells: int, inputs: int, outputs: int, needed: Sequence[bool]
) -> int:
    """Return the multiply-adds of a backward pass for one sample: what the forward pass mixed is mixed anew.

    Args:
        engine, convolution, cells, inputs, outputs: as of `forward`.
        needed: which of the gradients of (x, α, E) are.
    """
    orders = _orders(engine, convolution)
    return min(_backward(order, count(order, convolution, cells, inputs, outputs), *needed) for order in orders)


def _backward(order: str, work: MultiplyAdds, x: bool, attention: bool, cells: bool) -> int:
    if order == "mix_kernels":
        mixing = x + attention + cells  # for the gradient of x anew
        products = x + (attention or cells)
    elif order == "mix_outputs":
        mixing = attention + (x or cells)
        products = attention + x + cells  # for the gradient of α anew
    else:
        mixing = x + attention + cells  # for the gradient of the cells anew
        products = cells + (x or attention)
    return mixing * work.mixing + products * work.products


def _orders(engine: str, convolution: Convolution) -> Sequence[str]:
    if engine == "reference":
        return ("mix_kernels",)
    if engine in ORDERS:
        return (engine,)
    return [order for order in ORDERS if refusal(order, convolution) is None]
