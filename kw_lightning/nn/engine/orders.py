"""The orders of contraction and their multiply-adds, by which plans, planner, benchmarks and FLOP counters count.

Three orders give the same output; for one sample, with m mixtures of n cells:

- `mix_kernels`: the kernel is mixed out of the cells (m·n·|cell|), and the input convolved with it;
- `mix_outputs`: the input is convolved with all cells, and the results are mixed at each of its positions;
- `mix_inputs`: at each position of the output, what the mixtures read is mixed for each cell, then convolved with it.

They are counted as PyTorch counts its own convolutions: with positions in the padding, without biases. What a path
saves or wastes beyond that is counted by its `load`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from kw_lightning.nn.engine.convolution import Convolution

ORDERS = ("mix_kernels", "mix_outputs", "mix_inputs")


class MultiplyAdds(NamedTuple):
    """Multiply-adds of one order for a sample: of the linear mixture, and of the convolution or products."""

    mixing: int
    products: int


def count(order: str, convolution: Convolution, cells: int, inputs: int, outputs: int) -> MultiplyAdds:
    """Return the multiply-adds of a forward pass for one sample.

    Args:
        order: one of `ORDERS`.
        convolution: the geometry; stride, padding and dilation do not matter here.
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


def count_along_rank(
    convolution: Convolution, cells: int, outputs: int, *, batch: int, ranks: int, needed: Sequence[bool] | None = None
) -> int:
    """Return the multiply-adds of a pass for a batch whose kernels are mixed from bases, made once for all samples.

    Args:
        convolution, cells, outputs: as of `count`.
        batch: samples.
        ranks: bases of a mixture.
        needed: which of the gradients of (x, attention, E) are, for a backward pass; None for a forward pass.
    """
    kernel = math.prod(convolution.kernel_shape)
    if needed is None:
        return kernel * ranks * (batch + cells) + batch * kernel * outputs
    x, attention, stored = needed
    of_kernels = attention or stored
    samples = x + attention + of_kernels  # for the gradient of x, of the bases' weights, and of the bases
    once = (x or attention) + attention + stored
    return kernel * ranks * (batch * samples + cells * once) + (x + of_kernels) * batch * kernel * outputs


def count_backward(order: str, forward: MultiplyAdds, x: bool, attention: bool, cells: bool) -> int:
    """Return the multiply-adds of a backward pass, which mixes again what the forward pass mixed.

    Args:
        order: one of `ORDERS`.
        forward: of the order's forward pass.
        x, attention, cells: which gradients are needed.
    """
    if order == "mix_kernels":
        mixing = x + attention + cells  # again for the gradient of x
        products = x + (attention or cells)
    elif order == "mix_outputs":
        mixing = attention + (x or cells)
        products = attention + x + cells  # again for the gradient of α
    else:
        mixing = x + attention + cells  # again for the gradient of the cells
        products = cells + (x or attention)
    return mixing * forward.mixing + products * forward.products
